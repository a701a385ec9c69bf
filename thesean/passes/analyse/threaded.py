"""Is a graph that carries a state the stateless one? By numbers, step by step and past all that it compares with, and
by structure: numbers show what happens in the sequences that were tried.

B batch, T time
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.analyse.chunks import Difference, is_close, join, run_in_chunks, same_in_chunks
from thesean.passes.analyse.steps_apart import constants_of_time, first_mixed
from thesean.passes.graph.nodes import leaf_values, owner
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature

# A length past a constant is tried up to so many steps, and so many past it.
_FARTHEST, _PAST_IT = 4096, 3


@dataclass(frozen=True, kw_only=True)
class Threaded:
    """A graph with `states`, zeros by name that start one sequence, beside the `stateless` one."""

    graph_module: fx.GraphModule
    stateless: fx.GraphModule
    signature: Signature
    states: Mapping[str, torch.Tensor]

    @torch.no_grad()
    def misfit(self, length: int) -> tuple[str, int]:
        """Why it doesn't give the stateless one's numbers, "" where it does: in `length` single steps, node by node;
        and how long a sequence was, past each whole number that positions are compared with and past each window.
        """
        # one sequence: rows would interleave where a node flattens batch and time
        inputs, chunks = self._inputs(length), (1,) * length
        difference = same_in_chunks(self.graph_module, self.signature, inputs, dict(self.states), chunks)
        if difference is not None:
            return self._describe(difference), length
        if told := self._compare(inputs, chunks):
            return told, length
        graph, lengths = self.graph_module.graph, (length, length - 1 if length > 1 else 2)
        long, short = (record(self.graph_module, {**self._inputs(n), **self.states}) for n in lengths)
        if mixed := first_mixed(graph, long, short):
            return self._describe(Difference(node=mixed.node.name, what=mixed.what)), length
        windows = (getattr(m, "window", None) for m in self.graph_module.modules())
        held = (*constants_of_time(graph, long, short, self.states), *(w for w in windows if isinstance(w, int)))
        constants = [n for n in held if length < n + _PAST_IT <= _FARTHEST]
        if not constants:
            return "", length
        far = max(constants) + _PAST_IT
        # single steps where another way may begin, and all at once between
        cuts = {c + d for c in constants for d in (-1, 0, 1, 2)}
        ends = [0, *sorted(c for c in cuts if 0 < c < far), far]
        return self._compare(self._inputs(far, in_order=True), [b - a for a, b in itertools.pairwise(ends)]), far

    def _inputs(self, length: int, in_order: bool = False) -> dict[str, torch.Tensor]:
        sizes = {s: 1 if s.startswith("batch") else length for s in self.signature.symbols}
        device = str(next((p.device for p in self.graph_module.parameters()), torch.device("cpu")))
        return self.signature.random_inputs(sizes, device=device, in_order=in_order)

    def _compare(self, inputs: dict[str, torch.Tensor], chunks: Sequence[int]) -> str:
        """The outputs of one sequence in chunks with those at once, where the network itself runs."""
        try:
            wanted = leaf_values(self.stateless(**inputs))
        except (RuntimeError, IndexError):
            return ""
        try:
            pieces, _ = run_in_chunks(self.graph_module, self.signature, inputs, dict(self.states), chunks)
        except (RuntimeError, IndexError, ValueError) as error:
            return f"chunks don't run where the whole sequence does: {error}"
        for index, whole in enumerate(wanted):
            if not is_close(join([piece[index] for piece in pieces], whole.shape), whole):
                size = "single steps" if set(chunks) == {1} else f"chunks of {sum(chunks)} steps"
                return f"output {index} of {size} isn't the whole sequence's."
        return ""

    def _describe(self, difference: Difference) -> str:
        node = next(n for n in self.graph_module.graph.nodes if n.name == difference.node)
        if node.op == "call_module":
            return (
                f"part {node.target!r} needs the whole sequence ({difference.what}); it is not a causal recurrence. "
                "A sequence target with causal=True is one."
            )
        place = owner(node) or node.name
        return f"{place} ({node.target}) mixes time outside of the converted parts ({difference.what}). Convert it too."
