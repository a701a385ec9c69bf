"""The same attention with fewer heads of keys and values, each of which serves a group of queries: a smaller cache.

Ainslie et al. 2023 (GQA) take the mean of neighbouring heads and train on. Here the heads of a group are those that
lose least together, and their key, value, queries and outputs are solved on the guide's activations: see
shared/merge_heads.py.

B batch, T time, D width of the part, H heads of queries, G of keys and values, K head width of queries and keys
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from thesean.targets.shared.copying import copy_affine
from thesean.targets.shared.facts import Affine, AttentionFacts, PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.fewer_heads import NarrowHeadsOptions, check_heads
from thesean.targets.shared.head_metrics import moments_of
from thesean.targets.shared.head_norm import copy_norms
from thesean.targets.shared.merge_heads import Merge, Merged
from thesean.targets.shared.softmax_heads import SoftmaxHeads, softmax_frame


class GQAOptions(Options):
    """Width rule: heads and widths of the guide's attention; half of its heads of keys and values."""

    kv_heads: int | None = Field(default=None, gt=0, description="heads of keys and values; half the guide's")
    merge: Literal["solved", "mean"] = Field(
        default="solved", description="what one stands for: solved on the activations, or the mean of neighbours"
    )


class GroupedQueries(SoftmaxHeads):
    """y = last(concat_h softmax(q_h k_g' scale + bias_h) v_g), g the group of h. x_BTD -> y_BTD.

    It is still an attention: a language model with one decodes with a cache of keys and values, of `kv_heads` heads,
    which an export adds. `copy_from` takes means of neighbouring heads; `prepare` solves groups and heads.
    """

    family = "gqa"
    saved = ("kv_heads", "merge")

    def __init__(self, *, merge: str = "solved", **frame: Any) -> None:
        super().__init__(**frame)
        self.merge = merge

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """All projections; keys and values are the guide's where no head goes, else means."""
        facts = part.attention
        if facts is None or not self._fits(facts):
            return ()
        same = self.kv_heads % facts.kv_heads == 0
        order_H = torch.arange(self.heads, device=facts.query.bias_O.device)
        means = facts.grouped(self.kv_heads) if same else (self._mean(facts.key), self._mean(facts.value))
        self._take(facts, Merged(order_H, facts.query, *means, facts.output))
        return ("query", *(("key", "value") if same else ()), "output")

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose the groups and solve their heads. Raises NumericalError where the activations are not finite."""
        facts = part.attention
        if facts is None or not self._fits(facts) or not examples or self.merge == "mean":
            return
        if self.kv_heads % facts.kv_heads:
            known = moments_of((x for x, _ in examples), part.path)
            self._take(facts, Merge(facts, known).into(self.kv_heads))

    def _fits(self, facts: AttentionFacts) -> bool:
        widths = (self.width_in, self.heads, self.key_width, self.value_width, self.width_out)
        return widths == (facts.query.weight_OI.shape[1], facts.heads, *facts.widths, len(facts.output.bias_O))

    def _mean(self, affine: Affine) -> Affine:
        weight_OI, bias_O = (
            rows.unflatten(0, (self.kv_heads, self.heads // self.kv_heads, -1)).mean(1).flatten(0, 1) for rows in affine
        )
        return Affine(weight_OI, bias_O)

    def _take(self, facts: AttentionFacts, merged: Merged) -> None:
        pairs = (
            (self.query, merged.query), (self.key, merged.key), (self.value, merged.value), (self.last, merged.output),
        )  # fmt: skip
        for linear, affine in pairs:
            copy_affine(linear, affine)
        if facts.norms is not None:
            query, key = (norm.heads(merged.order_H) for norm in facts.norms)
            group = self.heads // self.kv_heads
            mean = key.each(lambda rows_HC: rows_HC.unflatten(0, (-1, group)).mean(1))
            copy_norms(self.norms, (query, mean))
        if facts.bias is not None:
            assert self.added is not None  # built for this part
            self.added.copy_from(facts.bias.heads(merged.order_H))


def check(part: PartFacts, options: GQAOptions) -> None:
    """Raises TargetMismatchError unless the part is a plain attention whose heads come in so many groups."""
    check_heads("gqa", part, NarrowHeadsOptions())
    facts = part.attention
    assert facts is not None  # check_heads
    wanted = options.kv_heads
    if wanted is not None and (wanted > facts.kv_heads or facts.heads % wanted):
        known = [n for n in range(1, facts.kv_heads + 1) if facts.heads % n == 0]
        raise part.mismatch(
            "gqa",
            found=f"kv_heads={wanted} with {facts.heads} heads of queries and {facts.kv_heads} of keys and values",
            expected="no more of these than there are, each for as many queries",
            advice=f"Set kv_heads to one of {', '.join(map(str, known))}.",
        )


def build(part: PartFacts, options: GQAOptions) -> GroupedQueries:
    facts = part.attention
    assert facts is not None  # checked
    most = max(1, facts.kv_heads // 2)
    half = next(n for n in range(most, 0, -1) if facts.heads % n == 0)
    return GroupedQueries(kv_heads=options.kv_heads or half, merge=options.merge, **softmax_frame(part))


TARGET = Family(
    name="gqa",
    summary="the same attention with fewer heads of keys and values, merged by what they do",
    options=GQAOptions,
    module=GroupedQueries,
    build=build,
    scope="mixing",
    check=check,
)
