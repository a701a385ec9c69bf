"""The same attention with fewer heads.

B batch, T time, D width of the part, H heads, K head width of queries and keys, V head width of values
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from thesean.errors import NumericalError
from thesean.targets.shared.facts import AttentionFacts, PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.fewer_heads import NarrowHeadsOptions, check_heads
from thesean.targets.shared.head_norm import copy_norms
from thesean.targets.shared.select_features import fold, moments, select_groups
from thesean.targets.shared.softmax_heads import SoftmaxHeads, softmax_frame

# Tokens that the selection looks at, per feature of the concatenated heads.
TOKENS_PER_FEATURE = 4


class NarrowAttention(SoftmaxHeads):
    """y = last(concat_h softmax(q_h k_h' scale + bias_h) v_h), with `heads` of the guide's own. x_BTD -> y_BTD.

    It is still an attention: a language model with one decodes with a cache of keys and values, which an export adds.
    `copy_from` keeps the heads with the largest weights; `prepare` chooses them anew by what they do to the guide's
    output, and folds the others into `last` by ridge regression. Grouped keys and values get a copy a head.
    """

    family = "narrow-heads"

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
        if facts.bias is not None:
            assert self.added is not None  # built for this part
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
    heads = options.heads or max(1, round(options.ratio * facts.heads))
    return NarrowAttention(**{**softmax_frame(part), "heads": heads})


TARGET = Family(
    name="narrow-heads",
    summary="the same attention with fewer of its heads, the rest folded in",
    options=NarrowHeadsOptions,
    module=NarrowAttention,
    build=build,
    scope="mixing",
    check=check,
)
