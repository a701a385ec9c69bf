"""What a guide's outputs lose without some of its parts: which of several neighbours stay.

N examples, P features
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from thesean.passes.analyse.regions import Region
from thesean.passes.graph.surgery import erase_dead


class LeavingOut:
    """`lost(regions)`: the normalised squared error of the outputs with these regions passed over, on some inputs.

    Where several blocks are to go, how alike two neighbours' activations are says little: the first block of a language
    model and the second one may be the most alike and the worst to lose.
    """

    def __init__(self, guide: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> None:
        """`inputs` are all of the guide's, by name."""
        self.guide, self.inputs = guide, dict(inputs)
        self._known: dict[frozenset[str], float] = {}
        self._wanted: list[torch.Tensor] | None = None

    def lost(self, regions: Collection[Region]) -> float:
        """0 is nothing; infinite where the rest can't be computed. Each region gives the shape that it reads."""
        key = frozenset(r.exit.name for r in regions)
        if key not in self._known:
            self._known[key] = self._lost(regions)
        return self._known[key]

    @torch.no_grad()
    def _lost(self, regions: Collection[Region]) -> float:
        if self._wanted is None:
            self._wanted = _floats(self.guide(**self.inputs))
        found = _floats(_without(self.guide, regions)(**self.inputs))
        errors = [_error(x, y) for x, y in zip(found, self._wanted, strict=True)]
        total = sum(errors) / max(1, len(errors))
        return total if total == total else float("inf")  # what is not a number is no choice


def _without(guide: fx.GraphModule, regions: Collection[Region]) -> fx.GraphModule:
    """The same graph, in which whoever reads a region's exit reads its entry. Parameters are the guide's own."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(guide.graph, copied))
    by_name = {old.name: new for old, new in copied.items()}
    passed: dict[fx.Node, fx.Node] = {}
    for region in regions:
        end, start = by_name[region.exit.name], by_name[region.entry.name]
        while start in passed:  # the end of a region before it that is passed over too
            start = passed[start]
        end.replace_all_uses_with(start)
        passed[end] = start
    erase_dead(graph)
    return fx.GraphModule(guide, graph)


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [v for v in tree_leaves(outputs) if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """In units of the variance over examples; an output that doesn't vary tells nothing."""
    x_NP, y_NP = (v.reshape(-1, v.shape[-1] if v.ndim > 1 else 1).double() for v in (found, wanted))
    spread = (y_NP - y_NP.mean(0)).square().sum()
    return float((x_NP - y_NP).square().sum() / spread) if spread > 0 else 0.0
