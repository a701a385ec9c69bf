"""Which dimension of a node is time: its shapes in two runs of other sizes tell.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature


class TwoSizes:
    """A graph as it ran at two batches and lengths; one that takes a fixed number of rows, at those and two lengths.

    `sizes` are (batch, steps) of both, `runs` all nodes' values, `shapes` by the name of each node that is a tensor. In
    eval mode, which is the caller's to set; what the network raises where it doesn't run at these sizes is raised.
    """

    def __init__(self, graph_module: fx.GraphModule, signature: Signature) -> None:
        rows = signature.fixed_rows
        self.sizes = ((2, 8), (3, 9)) if rows is None else ((rows, 8), (rows, 9))
        self.inputs = [inputs_of(graph_module, signature, *sizes) for sizes in self.sizes]
        self.runs = [record(graph_module, inputs) for inputs in self.inputs]
        found = [{n.name: v.shape for n, v in run.items() if isinstance(v, torch.Tensor)} for run in self.runs]
        self.shapes: dict[str, tuple[torch.Size, ...]] = {name: tuple(run[name] for run in found) for name in found[0]}

    def rank(self, node: fx.Node) -> int:
        return len(self.shapes[node.name][0])

    def time_dim(self, node: Any, longer: int = 0) -> int | None:
        """The one dimension behind that of the batch which is as long as the sequence, or so much longer; None where
        another moves too, and for what is no tensor.
        """
        shapes = self.shapes.get(node.name, ()) if isinstance(node, fx.Node) else ()
        pairs = list(zip(shapes, self.sizes, strict=False))
        if not pairs or any(not shape or shape[0] != batch for shape, (batch, _) in pairs):
            return None
        moves = [d for d in range(1, len(shapes[0])) if shapes[0][d] != shapes[1][d]]
        times = [d for d in moves if all(shape[d] == time + longer for shape, (_, time) in pairs)]
        return times[0] if len(moves) == 1 and times else None

    def grows(self, node: fx.Node) -> bool:
        """Whether there is one of it for each step, in whatever dimension."""
        first, second = (
            {d for d, size in enumerate(shape) if size == time}
            for shape, (_, time) in zip(self.shapes[node.name], self.sizes, strict=True)
        )
        return bool(first & second)

    def add_steps(self, node: fx.Node) -> None:
        """A node that was not there when the graph ran, (B, T)."""
        self.shapes[node.name] = tuple(torch.Size(sizes) for sizes in self.sizes)


def inputs_of(graph_module: fx.GraphModule, signature: Signature, batch: int, steps: int) -> dict[str, torch.Tensor]:
    sizes = {s: batch if s.startswith("batch") else steps for s in signature.symbols}
    device = next((str(p.device) for p in graph_module.parameters()), "cpu")
    return signature.random_inputs(sizes, device=device)
