"""Is a graph that carries a state the stateless one? By numbers, step by step and past all that it compares with, and
by structure: numbers show what happens in the sequences that were tried.

B batch, T time
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.chunks import Difference, after_sorting, is_close, join, run_in_chunks, same_in_chunks
from thesean.passes.analyse.steps_apart import constants_of_time, first_mixed
from thesean.passes.graph.nodes import leaf_values, owner
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature

# A length past a constant is tried so many steps past it, and up to so many steps. Up to far more where each costs what
# the last one did: no value of the whole sequence is larger than so many bytes, and steps times parameters are so few
# (seconds on one core).
_PAST_IT, _FARTHEST = 3, 4096
_FARTHEST_LINEAR, _LARGEST_BYTES, _MOST_PRODUCTS = 2**15 + _PAST_IT, 2**28, 10**11

_CROWD = 128  # steps that all go to one place


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What came of a comparison. `misfit`: why the numbers aren't the stateless one's, "" where they are; `length`: of
    the longest sequence; `untried`: the whole numbers that positions are compared with, or windows, past which there
    was none.
    """

    misfit: str = ""
    length: int
    untried: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Threaded:
    """A graph with `states`, zeros by name that start one sequence, beside the `stateless` one."""

    graph_module: fx.GraphModule
    stateless: fx.GraphModule
    signature: Signature
    states: Mapping[str, torch.Tensor]

    @torch.no_grad()
    def compare(self, length: int) -> Compared:
        """In `length` single steps, node by node; and once more past each whole number that positions are compared with
        and past each window, where that is a matter of seconds.
        """
        # one sequence: rows would interleave where a node flattens batch and time
        inputs, chunks = self._inputs(length), (1,) * length
        difference = same_in_chunks(self.graph_module, self.signature, inputs, dict(self.states), chunks)
        if difference is not None:
            return Compared(misfit=self._describe(difference), length=length)
        wanted = self._whole(inputs)
        if wanted is not None and (told := self._misfit(inputs, chunks, wanted)):
            return Compared(misfit=told, length=length)
        if after_sorting(self.graph_module.graph) and (told := self._crowded(length)):
            return Compared(misfit=told, length=length)
        graph, lengths = self.graph_module.graph, (length, length - 1 if length > 1 else 2)
        long, short = (record(self.graph_module, {**self._inputs(n), **self.states}) for n in lengths)
        if mixed := first_mixed(graph, long, short):
            misfit = self._describe(Difference(node=mixed.node.name, what=mixed.what))
            return Compared(misfit=misfit, length=length)
        windows = (getattr(m, "window", None) for m in self.graph_module.modules())
        held = {*constants_of_time(graph, long, short, self.states), *(w for w in windows if isinstance(w, int))}
        constants = sorted(n for n in held if length < n + _PAST_IT)
        tried = [n for n in constants if self._affords(n + _PAST_IT, length, long, short)]
        untried = tuple(n for n in constants if n not in tried)
        for last in range(len(tried), 0, -1):
            far = tried[last - 1] + _PAST_IT
            inputs = self._inputs(far, in_order=True)
            wanted = self._whole(inputs)
            if wanted is not None:  # what is past the end of a table is no length of the network's
                misfit = self._misfit(inputs, _pieces(tried[:last], far), wanted)
                return Compared(misfit=misfit, length=far, untried=untried)
        return Compared(length=length, untried=untried)

    def _affords(self, steps: int, length: int, long: Mapping[fx.Node, Any], short: Mapping[fx.Node, Any]) -> bool:
        """Whether so long a sequence is a matter of seconds, by the graph's structure and its values at `length`."""
        if steps <= _FARTHEST:
            return True
        keeps_all = any(getattr(m, "grows", None) is not None for m in self.graph_module.modules())
        products = steps * sum(p.numel() for p in self.graph_module.parameters())
        if steps > _FARTHEST_LINEAR or keeps_all or products > _MOST_PRODUCTS:
            return False
        return all(_bytes_at(steps / length, long[n], short.get(n)) <= _LARGEST_BYTES for n in long)

    def _inputs(self, length: int, in_order: bool = False) -> dict[str, torch.Tensor]:
        sizes = {s: 1 if s.startswith("batch") else length for s in self.signature.symbols}
        device = str(next((p.device for p in self.graph_module.parameters()), torch.device("cpu")))
        return self.signature.random_inputs(sizes, device=device, in_order=in_order)

    def _crowded(self, length: int) -> str:
        """Steps that are sorted by where they go, and all go to one place: what has room for some of them shows."""
        for chunks in ((_CROWD // 8,) * 8, (1,) * length):
            inputs = self._alike(self._inputs(sum(chunks)))
            wanted = self._whole(inputs)
            if wanted is not None:  # it is within the network's lengths
                return self._misfit(inputs, chunks, wanted)
        return ""

    def _alike(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With the first step of each in the place of all."""
        made = dict(inputs)
        for spec in self.signature.inputs:
            for dim in (d for d, n in enumerate(spec.shape) if isinstance(n, str) and not n.startswith("batch")):
                made[spec.name] = made[spec.name].narrow(dim, 0, 1).expand_as(made[spec.name]).contiguous()
        return made

    def _whole(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
        """The network's own outputs of a sequence at once; None where it doesn't run."""
        try:
            return leaf_values(self.stateless(**inputs))
        except (RuntimeError, IndexError):
            return None

    def _misfit(self, inputs: dict[str, torch.Tensor], chunks: Sequence[int], wanted: Sequence[torch.Tensor]) -> str:
        """The outputs of one sequence in chunks with those at once."""
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


def _pieces(constants: Sequence[int], length: int) -> list[int]:
    """Single steps where another way may begin, and all at once between."""
    cuts = {c + d for c in constants for d in (-1, 0, 1, 2)}
    ends = [0, *sorted(c for c in cuts if 0 < c < length), length]
    return [b - a for a, b in itertools.pairwise(ends)]


def _bytes_at(times: float, value: Any, other: Any) -> float:
    """How large a value gets where the sequence is so many times as long; `other` is what it is at another length."""
    if not (isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and value.ndim == other.ndim):
        return 0
    grown = sum(m != n for m, n in zip(value.shape, other.shape, strict=True))
    return value.numel() * value.element_size() * times**grown
