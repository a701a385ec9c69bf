"""How many batches a closed form reads: one batch may be of a short sentence, another of a thousand images.

What a solution loses for want of data grows with its features over the rows that they were seen in: tokens that are no
padding, places of an image, or examples. So there are to be so many rows for each feature that a part's layer reads, as
far as the data goes.
"""

from __future__ import annotations

import math
import time

import torch

from thesean import ranks
from thesean.distill.closed_form import last_of
from thesean.distill.seen import Seen
from thesean.distill.stream import check_same
from thesean.distill.task import Batch
from thesean.distill.training import Training
from thesean.passes.analyse.cost import SymbolicSizes
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.hybrid import Hybrid

# all-MiniLM-L6 on 16 batches of 1,024 tokens, 14 rows a feature: cosine .943 with the guide; on 48 of them .950
# (benchmarks/results/minilm.json)
_ROWS_A_FEATURE = 32

# Past the least: of inputs that are kept at hand; and of a budget of time, in which a batch takes as long as so many
# forwards of the guide
_MOST_BYTES, _MOST_TIME, _FORWARDS = 2**28, 0.25, 6


def enough(training: Training, hybrid: Hybrid, signature: Signature) -> tuple[list[Batch], str]:
    """The first batches of the data: as many as the recipe says, or as it takes; and what to tell of how many those
    were.
    """
    form = training.recipe.closed_form
    if not form.enabled or form.batches != "auto":
        return training.feed.take(form.least), ""
    rows = _Rows(training, hybrid, signature)
    taken: list[Batch] = []
    size, more, most = 0, False, math.inf
    for batch in training.feed.batches:
        taken.append(batch)
        size += sum(value.nbytes for value in batch[1].values())
        more = rows.wanted_after(batch[1])
        if len(taken) == form.least and more:
            most = _in_time(training, batch)
        if len(taken) >= form.least and not (more and size < _MOST_BYTES and len(taken) < most):
            break
    for batch in taken[:1]:
        check_same(batch)
    if not more and len(taken) <= form.least:
        return taken, ""
    seen = f"closed form: {len(taken)} batches were read, in which a feature is seen in {rows.a_feature:.2g} rows"
    return taken, f"{seen}; {_ROWS_A_FEATURE} would be enough" if more else seen


@torch.no_grad()
def _in_time(training: Training, batch: Batch) -> float:
    """Batches like this one that a closed form may read of a budget of time."""
    if training.seconds == math.inf:
        return math.inf
    begun = time.monotonic()
    training.guide(**batch[1])
    (took,) = ranks.agreed(time.monotonic() - begun)
    return _MOST_TIME * training.left / (_FORWARDS * max(took, 1e-9))


class _Rows:
    """Of parts whose last layer is solved: how many they have been seen in."""

    def __init__(self, training: Training, hybrid: Hybrid, signature: Signature) -> None:
        self.signature, self.seen = signature, Seen(training.guide)
        self._masks = intermediates(training.guide, self.seen.names, with_output=False)
        solved = [(r, last_of(hybrid.module(r))) for r in hybrid.replacements]
        self._layers = [(r, layer) for r, layer in solved if layer is not None]
        self._rows = [0.0] * len(self._layers)

    @torch.no_grad()
    def wanted_after(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether more are, once these are counted."""
        sizes = SymbolicSizes(self.signature.check(inputs))
        masks = self._masks(**inputs) if self.seen.names else {}
        for k, (r, layer) in enumerate(self._layers):
            numbers = math.prod(sizes[d] if isinstance(d, str) else d for d in r.facts.output_shape)
            mask_BT = self.seen.of(r.guide_exit, masks)
            shown = 1.0 if mask_BT is None else float(mask_BT.float().mean())
            self._rows[k] += shown * numbers / layer.out_features
        return self.a_feature < _ROWS_A_FEATURE

    @property
    def a_feature(self) -> float:
        """Of the part that has the fewest for its features."""
        pairs = zip(self._rows, self._layers, strict=True)
        return min((rows / layer.in_features for rows, (_, layer) in pairs), default=math.inf)
