"""The same attention whose keys and values are maps of one narrow latent a token: the latent is all that is remembered.

DeepSeek-AI 2024 (DeepSeek-V2, section 2.1, multi-head latent attention) trains one from scratch, with keys of their own
for a rotation. Here the guide's keys and values are solved as a low rank in the metric of its activations. Keys of a
guide that turns or norms them are made of the latent first, so that the full rank is the guide: each step makes those
of all that is remembered anew, S R G (K + V) products. Else queries and outputs take these products over, and a step
reads the latent alone, S R 2 H.

B batch, T time, D width of the part, R width of the latent, G heads of keys and values, K head width of queries and
keys, V of values, E outputs of all keys and values, I inputs with a column of biases
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from thesean.targets.shared.copying import copy_affine
from thesean.targets.shared.facts import AttentionFacts, PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.head_metrics import metrics_of, moments_of
from thesean.targets.shared.head_norm import copy_norms
from thesean.targets.shared.low_rank import Root, root, share
from thesean.targets.shared.select_features import FeatureMoments
from thesean.targets.shared.sequence import check_sequence
from thesean.targets.shared.softmax_heads import SoftmaxHeads, softmax_frame

# Of the inputs' mean variance: what they never did still has a direction.
_RIDGE = 1e-6


class LatentOptions(Options):
    """Width rule: heads and widths of the guide's attention; R = `rank`, or half of what keys and values have now."""

    rank: int | None = Field(default=None, gt=0, description="width of the latent; half that of keys and values")


class LatentAttention(SoftmaxHeads):
    """y = last(concat_h softmax(q_h k_g' scale + bias_h) v_g), g the group of h, k = key(c), v = value(c), c = down(x).

    x_BTD -> y_BTD. It is still an attention: a language model with one decodes with a cache, of c_BTR alone, which an
    export adds.
    """

    family = "mla"
    remembers_what_it_reads = True
    saved = ("kv_heads", "rank")

    def __init__(self, *, rank: int, **frame: Any) -> None:
        super().__init__(reads=rank, **frame)
        self.rank = rank
        self.down = nn.Linear(self.width_in, rank, bias=False)

    def read(self, x_BTD: torch.Tensor) -> torch.Tensor:
        latent_BTR: torch.Tensor = self.down(x_BTD)
        return latent_BTR

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Query, output and norms; keys and values as the nearest of this rank, as if all inputs were alike."""
        facts = part.attention
        if facts is None or not self._fits(facts):
            return ()
        copy_affine(self.query, facts.query)
        copy_affine(self.last, facts.output)
        copy_norms(self.norms, facts.norms)
        if facts.bias is not None:
            assert self.added is not None  # built for this part
            self.added.copy_from(facts.bias)
        eye_DD = torch.eye(self.width_in, dtype=torch.float64, device=facts.query.bias_O.device)
        self._solve(facts, FeatureMoments(1, torch.zeros_like(eye_DD[0]), eye_DD))
        return ("query", "output")

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Solve latent, keys and values. Raises NumericalError where the activations are not finite."""
        if part.attention is not None and self._fits(part.attention) and examples:
            self._solve(part.attention, moments_of((x for x, _ in examples), part.path))

    def _fits(self, facts: AttentionFacts) -> bool:
        widths = (self.width_in, self.heads, self.kv_heads, self.key_width, self.value_width, self.width_out)
        found = (facts.query.weight_OI.shape[1], facts.heads, facts.kv_heads, *facts.widths, len(facts.output.bias_O))
        return widths == found

    def _solve(self, facts: AttentionFacts, known: FeatureMoments) -> None:
        """Heads' keys and values below one another, each by what its errors count for, summed over a group's heads."""
        maps = facts.grouped(self.kv_heads)
        weights = [w for a in maps for w in a.weight_OI.double().unflatten(0, (self.kv_heads, -1))]
        group = self.heads // self.kv_heads
        metrics: list[Root] = [
            root(metric_KK)
            for each_HKK in metrics_of(facts, known)
            for metric_KK in each_HKK.unflatten(0, (-1, group)).sum(1)
        ]
        covariance_DD = known.covariance_EE.clone()
        covariance_DD.diagonal().add_(_RIDGE * covariance_DD.diagonal().mean() + 1e-12)
        shared = share(weights, covariance_DD, metrics, self.rank)
        self.down.weight.copy_(shared.down_RI)
        split = self.kv_heads * self.key_width
        for linear, affine, up_ER in zip((self.key, self.value), maps, shared.up_NR.tensor_split([split]), strict=True):
            linear.weight.copy_(up_ER)
            missing_ED = affine.weight_OI.double() - up_ER @ shared.down_RI
            linear.bias.copy_(affine.bias_O + missing_ED @ known.mean_E)


def check(part: PartFacts, options: LatentOptions) -> None:
    """Raises TargetMismatchError unless the part is a plain attention with keys and values of such a rank."""
    check_sequence("mla", part)
    facts, keep = part.attention, f"Keep it with {part.keep}."
    if facts is None:
        found, expected = "a part without attention", "one attention whose keys and values are remembered"
        raise part.mismatch("mla", found=found, expected=expected, advice=keep)
    if not facts.plain:
        raise part.mismatch(
            "mla",
            found=f"an attention that softmax(q k' scale + bias) v alone does not reproduce: {facts.differs}",
            expected="one that is known whole: rotary positions, norms and a bias of distance included",
            advice=keep,
        )
    most = min(_most(facts), part.width_in)
    if options.rank is not None and options.rank > most:
        raise part.mismatch(
            "mla",
            found=f"rank={options.rank}",
            expected=f"at most {most}, which is the full rank of its keys and values",
            advice=f"Set rank={most} or less.",
        )


def _most(facts: AttentionFacts) -> int:
    """Width of all keys and values."""
    return facts.kv_heads * sum(facts.widths)


def build(part: PartFacts, options: LatentOptions) -> LatentAttention:
    facts = part.attention
    assert facts is not None  # checked
    rank = options.rank or max(1, min(_most(facts) // 2, part.width_in))
    return LatentAttention(rank=rank, kv_heads=facts.kv_heads, **softmax_frame(part))


TARGET = Family(
    name="mla",
    summary="the same attention with keys and values made of one narrow latent, which is its cache",
    options=LatentOptions,
    module=LatentAttention,
    build=build,
    scope="mixing",
    check=check,
)
