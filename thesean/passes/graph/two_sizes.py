"""Which dimension of a node is time: the shapes of all nodes in two runs of other sizes tell.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from thesean.passes.graph.record import Recorded, record
from thesean.passes.graph.signature import Signature

# (batch, steps) of the two runs: a dimension that is the one or the other in both is known to be it
SIZES = ((2, 8), (3, 9))

# Of each node that is a tensor, by name: its shapes in both runs
Shapes = dict[str, tuple[torch.Size, ...]]


def record_at_two_sizes(graph_module: fx.GraphModule, signature: Signature) -> list[Recorded]:
    """In eval mode, which is the caller's to set. Raises what the network does where it doesn't run at these sizes."""
    return [record(graph_module, inputs_of(graph_module, signature, *sizes)) for sizes in SIZES]


def shapes_of(runs: Sequence[Recorded]) -> Shapes:
    found = [{n.name: v.shape for n, v in values.items() if isinstance(v, torch.Tensor)} for values in runs]
    return {name: tuple(run[name] for run in found) for name in found[0]}


def inputs_of(graph_module: fx.GraphModule, signature: Signature, batch: int, steps: int) -> dict[str, torch.Tensor]:
    sizes = {s: batch if s.startswith("batch") else steps for s in signature.symbols}
    device = next((str(p.device) for p in graph_module.parameters()), "cpu")
    return signature.random_inputs(sizes, device=device)


def time_dim(shapes: Sequence[torch.Size], longer: int = 0) -> int | None:
    """The one dimension behind that of the batch which is as long as the sequence, or so much longer; None where
    another moves too.
    """
    if not shapes or any(not s or s[0] != batch for s, (batch, _) in zip(shapes, SIZES, strict=True)):
        return None
    moves = [d for d in range(1, len(shapes[0])) if shapes[0][d] != shapes[1][d]]
    times = [d for d in moves if all(s[d] == time + longer for s, (_, time) in zip(shapes, SIZES, strict=True))]
    return times[0] if len(moves) == 1 and times else None
