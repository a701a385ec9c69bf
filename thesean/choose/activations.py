"""The guide's activations at the ends of parts: computed once for all candidates of a part, which are fitted on them
and judged by what the network makes of them from there on.

Between two parts nothing of the guide runs twice. What doesn't fit into memory is mapped from disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thesean.choose.candidates import Candidates
from thesean.distill.seen import Seen
from thesean.passes.graph.nodes import from_inputs
from thesean.passes.graph.shelf import Shelf
from thesean.passes.graph.tail import Tail
from thesean.passes.graph.walk import Inputs, Walk
from thesean.passes.plan.bind import BoundPart
from thesean.passes.plan.hybrid import Replacement
from thesean.passes.plan.sites import ends_of

Values = Mapping[str, Any]
Examples = list[tuple[torch.Tensor, torch.Tensor]]


class Activations:
    """`fitted` batches are those that modules are fitted on, `judged` those that hybrids are judged on.

    Asked for part after part; an earlier one again begins at the inputs.
    """

    def __init__(
        self, candidates: Candidates, fitted: Sequence[Inputs], judged: Sequence[Inputs], shelf: Shelf | None = None
    ) -> None:
        guide = candidates.binder.captured.graph_module
        self.fitted, self.judged, self.shelf = fitted, judged, shelf or Shelf()
        self._seen = Seen(guide)
        rows = [[o for o in row if o is not None and o.target is not None] for row in candidates.options]
        self._known = [_known(guide, row) for row in rows]
        self._walks = (
            Walk(guide, [[*_ends(row), *self._seen.names] for row in rows], fitted, shelf=self.shelf),
            Walk(guide, [sorted(known) for known in self._known], judged, shelf=self.shelf),
        )
        self._part = -1
        self._fit: list[Values] = []
        self._judge: list[Values] = []
        self._examples: dict[tuple[object, ...], Examples] = {}

    @torch.no_grad()
    def examples(self, part: int, replacement: Replacement) -> Examples:
        """Pairs at the ends of a replacement in this part, without padded steps."""
        self._go_to(part)
        key = (replacement.guide_entry, replacement.guide_exit, replacement.facts.mixing, bool(replacement.masks))
        if key not in self._examples:
            pairs = [pair for values in self._fit for pair in self._seen.examples(replacement, values)]
            self._examples[key] = self.shelf.keep(pairs) if self._seen.names else pairs  # copies, where steps are left
        return self._examples[key]

    def tail(self, part: int, hybrid: fx.GraphModule) -> JudgedTail:
        """A hybrid in which this part alone is replaced, from there on."""
        self._go_to(part)
        return JudgedTail(hybrid, self._known[part], self._judge, self.judged)

    @torch.no_grad()
    def _go_to(self, part: int) -> None:
        if part == self._part:
            return
        self._examples, self._fit, self._judge = {}, [], []  # or two parts' would be held at once
        self.shelf.clear()
        fit, judge = self._walks
        self._fit = [self.shelf.keep(fit.get(part, number)) for number in range(len(self.fitted))]
        self._judge = [self.shelf.keep(judge.get(part, number)) for number in range(len(self.judged))]
        self._part = part


class JudgedTail:
    """What a hybrid puts out on the judged batches, computed from what of the guide is `known` in it."""

    def __init__(
        self, hybrid: fx.GraphModule, known: Collection[str], values: Sequence[Values], inputs: Sequence[Inputs]
    ) -> None:
        self.hybrid, self.values, self.inputs = hybrid, values, inputs
        self._tail = Tail(hybrid, known)

    def output(self, number: int) -> Any:
        """On a judged batch. The hybrid is in eval mode by then."""
        return self._tail.output(self.values[number], self.inputs[number])


def _ends(row: Sequence[BoundPart]) -> list[str]:
    """Entries and exits of all replacements that a part may have."""
    return list(dict.fromkeys(n.name for option in row for pair in ends_of(option.sites) for n in pair))


def _known(guide: fx.GraphModule, row: Sequence[BoundPart]) -> set[str]:
    """What no candidate of a part changes, is computed from the inputs, and is read by what may change.

    Constants are computed again: all of the guide's cast weights at once would take as much room as the weights.
    """
    own = {n for option in row for r in (option.region, *(s.region for s in option.sites)) for n in r.nodes}
    changed: set[fx.Node] = set()
    for node in guide.graph.nodes:
        if node in own or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
    settled = from_inputs(guide.graph) - changed
    read = {i for n in changed for i in n.all_input_nodes}
    entries = set(_ends(row))
    return {n.name for n in settled if n in read or n.name in entries}
