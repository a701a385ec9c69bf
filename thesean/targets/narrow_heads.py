"""The same attention with fewer heads.

B batch, T time, D width of the part, H heads, K head width of queries and keys, V head width of values
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import nn

from thesean.errors import NumericalError
from thesean.targets.shared.distance_bias import AddedBias
from thesean.targets.shared.facts import AttentionFacts, PartFacts, attend
from thesean.targets.shared.family import Family
from thesean.targets.shared.fewer_heads import NarrowHeadsOptions, check_heads
from thesean.targets.shared.head_norm import Meeting, copy_norms, head_norms
from thesean.targets.shared.module import MaskReader, State
from thesean.targets.shared.rotation import Rotate, Rotation
from thesean.targets.shared.select_features import fold, moments, select_groups

# Tokens that the selection looks at, per feature of the concatenated heads.
TOKENS_PER_FEATURE = 4


class NarrowAttention(MaskReader):
    """y = last(concat_h softmax(q_h k_h' scale + bias_h) v_h), with `heads` of the guide's own. x_BTD -> y_BTD.

    It is still an attention: a language model with one decodes with a cache of keys and values, which an export adds.
    `copy_from` keeps the heads with the largest weights; `prepare` chooses them anew by what they do to the guide's
    output, and folds the others into `last` by ridge regression. Grouped keys and values get a copy a head.
    """

    family = "narrow-heads"
    reads_mask = True
    last: nn.Linear

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        heads: int,
        key_width: int,
        value_width: int,
        scale: float,
        causal: bool,
        **meeting: Unpack[Meeting],
    ) -> None:
        super().__init__()
        rotation, bias = meeting.get("rotation"), meeting.get("bias")
        self.width_in = width_in
        self.width_out = width_out
        self.heads = heads
        self.key_width = key_width
        self.value_width = value_width
        self.scale = float(scale)
        self.causal = causal
        self.rotate = None if rotation is None else Rotate(Rotation.of(rotation), key_width)
        self.norm_eps, self.norm_form = meeting.get("norm_eps"), meeting.get("norm_form")
        self.norms = head_norms(key_width, (heads, heads), self.norm_eps, self.norm_form)
        self.added = None if bias is None else AddedBias(heads, bias)
        self.query = nn.Linear(width_in, heads * key_width)
        self.key = nn.Linear(width_in, heads * key_width)
        self.value = nn.Linear(width_in, heads * value_width)
        self.last = nn.Linear(heads * value_width, width_out)

    def config(self) -> dict[str, Any]:
        return {
            "width_in": self.width_in,
            "width_out": self.width_out,
            "heads": self.heads,
            "key_width": self.key_width,
            "value_width": self.value_width,
            "scale": self.scale,
            "causal": self.causal,
            "rotation": None if self.rotate is None else self.rotate.rotation.rows(),
            "norm_eps": self.norm_eps,
            "norm_form": self.norm_form,
            "bias": None if self.added is None else self.added.bias.sizes,
        }

    def masked_features(
        self, x: torch.Tensor, state: State | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State | None]:
        query_BTHK, key_BTHK, value_BTHV = (
            linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.query, self.key, self.value)
        )
        if len(self.norms):
            query_BTHK, key_BTHK = self.norms[0](query_BTHK), self.norms[1](key_BTHK)
        if self.rotate is not None:
            query_BTHK, key_BTHK = self.rotate(query_BTHK), self.rotate(key_BTHK)
        bias = None if self.added is None else self.added.bias
        return attend(query_BTHK, key_BTHK, value_BTHV, self.scale, self.causal, mask, bias), None

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        tokens = part.rows(sizes)
        time = tokens // part.rows(sizes, 1)
        weights = sum(p.numel() for p in self.parameters() if p.ndim >= 2)
        scores = time * self.heads * (self.key_width + self.value_width)
        return 2 * tokens * (weights + scores)

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """The heads whose value and output weights' norms multiply to the most: a guess without data."""
        facts = part.attention
        if facts is None or not self._fits(facts):
            return ()
        value_H = facts.value.weight_OI.unflatten(0, (facts.heads, -1)).flatten(1).norm(dim=1)
        output_H = facts.output.weight_OI.unflatten(1, (facts.heads, -1)).norm(dim=(0, 2))
        self._keep(facts, (value_H * output_H).topk(self.heads).indices.sort().values)
        return ("query", "key", "value")

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose the heads and fold the others in. Raises NumericalError where the activations are not finite."""
        facts = part.attention
        if facts is None or not self._fits(facts) or self.heads == facts.heads or not examples:
            return
        tokens = sum(x.shape[:-1].numel() for x, _ in examples)
        stride = math.ceil(tokens / (TOKENS_PER_FEATURE * facts.heads * self.value_width))
        try:
            known = moments(facts.mixed_values(x, self.causal).flatten(0, -2)[::stride] for x, _ in examples)
        except ValueError as error:
            raise NumericalError(f"{part.path}: can't choose heads, {error}. Look for NaN in the data.") from error
        kept_H = select_groups(known.covariance_EE, facts.output.weight_OI, self.value_width, self.heads)
        self._keep(facts, kept_H)
        weight_OE, bias_O = fold(known, facts.output.weight_OI, _features_of(kept_H, self.value_width))
        self.last.weight.copy_(weight_OE)
        self.last.bias.copy_(facts.output.bias_O + bias_O)

    def _fits(self, facts: AttentionFacts) -> bool:
        widths = (self.width_in, self.key_width, self.value_width, self.width_out)
        enough = facts.heads >= self.heads
        return enough and widths == (facts.query.weight_OI.shape[1], *facts.widths, len(facts.output.bias_O))

    def _keep(self, facts: AttentionFacts, kept_H: torch.Tensor) -> None:
        key_rows, value_rows = _features_of(kept_H, self.key_width), _features_of(kept_H, self.value_width)
        if facts.norms is not None:
            copy_norms(self.norms, tuple(norm.heads(kept_H) for norm in facts.norms))  # type: ignore[arg-type]
        if self.added is not None and facts.bias is not None:
            self.added.copy_from(facts.bias.heads(kept_H))
        for linear, affine, rows in (
            (self.query, facts.query, key_rows),
            (self.key, facts.key, key_rows),
            (self.value, facts.value, value_rows),
        ):
            linear.weight.copy_(affine.weight_OI[rows])
            linear.bias.copy_(affine.bias_O[rows])
        self.last.weight.copy_(facts.output.weight_OI[:, value_rows])
        self.last.bias.copy_(facts.output.bias_O)


def _features_of(heads_H: torch.Tensor, width: int) -> torch.Tensor:
    """The features of these heads among all heads' concatenated ones."""
    return (heads_H.unsqueeze(1) * width + torch.arange(width, device=heads_H.device)).flatten()


def check(part: PartFacts, options: NarrowHeadsOptions) -> None:
    check_heads("narrow-heads", part, options)


def build(part: PartFacts, options: NarrowHeadsOptions) -> NarrowAttention:
    facts = part.attention
    assert facts is not None  # check_heads
    key_width, value_width = facts.widths
    return NarrowAttention(
        width_in=part.width_in,
        width_out=part.width_out,
        heads=options.heads or max(1, round(options.ratio * facts.heads)),
        key_width=key_width,
        value_width=value_width,
        scale=facts.scale,
        causal=part.mixing == "causal",
        rotation=None if facts.rotation is None else facts.rotation.rows(),
        norm_eps=facts.norm_eps,
        norm_form=facts.norm_form,
        bias=None if facts.bias is None else facts.bias.sizes,
    )


TARGET = Family(
    name="narrow-heads",
    summary="the same attention with fewer of its heads, the rest folded in",
    options=NarrowHeadsOptions,
    module=NarrowAttention,
    build=build,
    scope="mixing",
    check=check,
)
