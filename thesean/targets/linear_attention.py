"""Gated linear attention that takes over the guide's query, key, value and output projections.

How it meets positions, windows and what came long ago is told where the heads are, in shared/linear_heads.py.
"""

from __future__ import annotations

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.heads import LinearAttentionOptions, check, heads_frame
from thesean.targets.shared.linear_heads import LinearHeads


class LinearAttention(LinearHeads):
    """y_t = last(mean_t), mean_t = sum_s w_ts v_s / sum_s w_ts of each head, and the taps beside it.

    w_ts = decay_{s..t} phi(q_t).phi(k_s), in a window the guide's own exp(scale q_t.k_s + bias). x_BTD, state ->
    (y_BTD, state): state_BGFk, with a window or taps a tuple that begins with it. Bidirectional: s over all tokens, no
    decay, no state.
    """

    family = "linear-attention"


def build(part: PartFacts, options: LinearAttentionOptions) -> LinearAttention:
    return LinearAttention(**heads_frame(part, options))


TARGET = Family(
    name="linear-attention",
    summary="gated, normalised linear attention on the guide's own q, k, v and o",
    options=LinearAttentionOptions,
    module=LinearAttention,
    build=build,
    scope="mixing",
    check=check,
)
