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
    def misfit(self, length: int) -> str:
        """Why it doesn't give the stateless one's numbers, "" where it does: in `length` single steps, node by node."""
        # one sequence: rows would interleave where a node flattens batch and time
        inputs, chunks = self._inputs(length), (1,) * length
        difference = same_in_chunks(self.graph_module, self.signature, inputs, dict(self.states), chunks)
        if difference is not None:
            return self._describe(difference)
        if told := self._compare(inputs, chunks) or self._mixed(length):
            return told
        far = self.far(length)
        if far <= length:
            return ""
        # single steps where another way may begin, and all at once between
        cuts = {c + d for c in self._constants(length) for d in (-1, 0, 1, 2)}
        ends = [0, *sorted(c for c in cuts if 0 < c < far), far]
        return self._compare(self._inputs(far, in_order=True), [b - a for a, b in itertools.pairwise(ends)])

    def far(self, length: int) -> int:
        """A length past each whole number that the graph compares positions with and past each of its windows, as far
        as they aren't out of reach; `length` where there is none.
        """
        return max((n + _PAST_IT for n in self._constants(length)), default=length)

    def _constants(self, length: int) -> list[int]:
        long, short = self._runs(length)
        windows = [getattr(m, "window", None) for m in self.graph_module.modules()]
        found = constants_of_time(self.graph_module.graph, long, short, self.states)
        return [n for n in (*found, *(w for w in windows if isinstance(w, int))) if length < n + _PAST_IT <= _FARTHEST]

    def _mixed(self, length: int) -> str:
        long, short = self._runs(length)
        mixed = first_mixed(self.graph_module.graph, long, short)
        return "" if mixed is None else self._describe(Difference(node=mixed.node.name, what=mixed.what))

    def _runs(self, length: int) -> tuple[Mapping[fx.Node, object], Mapping[fx.Node, object]]:
        """Every node's value at this length and at another one."""
        lengths = (length, length - 1 if length > 1 else 2)
        long, short = (record(self.graph_module, {**self._inputs(n), **self.states}) for n in lengths)
        return long, short

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
