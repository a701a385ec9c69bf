"""Which rows of the guide's activations and outputs are tokens: what the guide holds at padded steps is noise.

B batch, T time, N tokens, D width, P values of an example
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from thesean import exchange, ranks
from thesean.distill.outputs import named_leaves
from thesean.passes.analyse.padding import Padding
from thesean.passes.graph.nodes import named_dim
from thesean.passes.plan.hybrid import Replacement
from thesean.recipe import Samples

Values = Mapping[str, Any]

# CKA's Gram or covariance costs grow with the examples; past this many tokens the estimate gains nothing
MAX_EXAMPLES = 4096


class Seen:
    """Masks for the nodes of one guide. `names` are those of the nodes that hold the masks: whoever asks hands over
    their values.
    """

    def __init__(self, guide: fx.GraphModule) -> None:
        self.guide = guide
        self.masks: tuple[Padding, ...] = tuple(guide.meta.get("padding", ()))
        self.names: list[str] = [m.node for m in self.masks]
        self._named = {n.name: n for n in guide.graph.nodes} if self.masks else {}
        self._masks_of: dict[str, list[Padding]] = {}  # what the graph decides once, not each step of training

    def of(self, node: str, values: Values) -> torch.Tensor | None:
        """mask_BT for a node of the guide whose first dimensions are those of a mask; None where every step is seen."""
        if not self.masks:
            return None
        if node not in self._masks_of:
            own = self._named[node]
            self._masks_of[node] = [m for m in self.masks if self._same_steps(self._named[m.node], own)]
        return self._shown(self._masks_of[node], values)

    def read_by(self, replacement: Replacement, values: Values) -> torch.Tensor | None:
        """mask_BT that a replacement is given in the hybrid; None where every step is seen."""
        return self._shown(replacement.masks, values)

    def of_outputs(self, values: Values) -> dict[str, torch.Tensor]:
        """mask_BT by the names of the outputs that have one, where some step is hidden."""
        found = {name: self.of(node, values) for name, node in self._outputs.items()}
        return {name: mask for name, mask in found.items() if mask is not None}

    def examples(self, replacement: Replacement, values: Values) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The guide's activations at a part's ends without what is hidden, as pairs for `prepare`: the rows of a batch
        with as many tokens together, each as it would be alone.
        """
        x_BTD, y_BTD = values[replacement.guide_entry], values[replacement.guide_exit]
        mask_BT = self.of(replacement.guide_exit, values)
        if mask_BT is None:
            return [(x_BTD, y_BTD)]
        if replacement.facts.mixing == "none":
            return [(x_BTD[mask_BT].unsqueeze(0), y_BTD[mask_BT].unsqueeze(0))]
        if not replacement.masks:
            return [(x_BTD, y_BTD)]
        pairs = []
        count_B = mask_BT.sum(1)
        for count in count_B.unique().tolist():
            if count:
                rows = count_B == count
                kept = mask_BT[rows]
                pairs.append(tuple(z[rows][kept].unflatten(0, (-1, count)) for z in (x_BTD, y_BTD)))
        return pairs

    @cached_property
    def _outputs(self) -> dict[str, str]:
        """Name of an output -> name of its node."""
        leaves = named_leaves(self.guide.graph.output_node().args[0], fx.Node)
        return {name: node.name for name, node in leaves.items()}

    def _shown(self, masks: Sequence[Padding], values: Values) -> torch.Tensor | None:
        shown: torch.Tensor | None = None
        for mask in masks:
            seen_BT = mask.seen(values[mask.node])
            shown = seen_BT if shown is None else shown & seen_BT
        # ranks do the same: what one of them hides is left out of what is gathered
        return None if shown is None or not ranks.any_of(not bool(shown.all())) else shown

    def _same_steps(self, mask: fx.Node, node: fx.Node) -> bool:
        value, steps = node.meta.get("val"), mask.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(steps, torch.Tensor):
            return False
        symbols = self.guide.meta["symbols"]  # one size may bear several
        dims = [[named_dim(d, symbols) for d in shape] for shape in (value.shape[:2], steps.shape)]
        return value.ndim in (2, 3) and dims[0] == dims[1]


def rows(value: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """(B, T, ...) -> (N, ...) of what is seen; all of it as it is without a mask."""
    return value if mask_BT is None else value[mask_BT]


def sampled(value: torch.Tensor, mask_BT: torch.Tensor | None, samples: Samples = "tokens") -> torch.Tensor:
    """(N, P): every token of a sequence is a sample, or every sequence with its tokens side by side, where those that
    are hidden are 0; every image or vector of a batch otherwise.
    """
    if samples == "tokens":
        return examples(rows(value, mask_BT))
    if mask_BT is not None:
        value = value.masked_fill(~mask_BT.view(*mask_BT.shape, *[1] * (value.ndim - 2)), 0)
    return _some(value.flatten(1))


def examples(value: torch.Tensor) -> torch.Tensor:
    """(N, P): every token of a sequence is an example, every image or vector of a batch otherwise."""
    return _some(value.flatten(0, 1) if value.ndim == 3 else value.flatten(1))  # picked tokens are (N, P) already


def _some(flat: torch.Tensor) -> torch.Tensor:
    """So many of all ranks' rows as a similarity is computed on."""
    if ranks.count() > 1:
        return _of_all(flat)
    if flat.shape[0] > MAX_EXAMPLES:
        flat = flat[:: -(-flat.shape[0] // MAX_EXAMPLES)]
    return flat


def _of_all(flat: torch.Tensor) -> torch.Tensor:
    """The same examples of the rows of all ranks, chosen before they are sent."""
    before, total = exchange.place(flat.shape[0])
    every = -(-total // MAX_EXAMPLES)
    return exchange.gather(flat[-before % every :: every], kind="exits")
