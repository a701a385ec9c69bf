"""Gated linear attention that takes over the guide's query, key, value and output projections.

How it meets positions, windows and what came long ago is told where the heads are, in shared/linear_heads.py.

B batch, T time, D width of the part, G heads of keys and values, C width of a head's query and key, K width of a value,
k = K + 1, W tokens in the window, N sinks, P taps
"""

from __future__ import annotations

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.heads import LinearAttentionOptions, check, heads_frame
from thesean.targets.shared.linear_heads import LinearHeads


class LinearAttention(LinearHeads):
    """y = last(sum_s w_ts v_s / sum_s w_ts), w_ts = decay_{s..t} phi(q_t).phi(k_s), phi(x) = softmax([Wx, -Wx]).

    Feature map: Zhang et al. 2024 (Hedgehog), W learnt per head from the identity. Decay: Yang et al. 2024, one
    scalar a head. The sum of weights is carried as one more column of the values, all ones. Keys, values, their map,
    decay and state are per head of keys: a guide with grouped queries keeps its groups (Ainslie et al. 2023).
    x_BTD, state_BGFk -> (y_BTD, state_BGFk). Bidirectional: s over all tokens, no decay, no state.

    With a window, w_ts = exp(scale q_t.k_s + bias) as in the guide, turned as there by `rotation`, rows of (feature,
    feature, radians a step), and with its bias of the distance t - s, for the last W tokens, t's own included; of those
    that leave it the first `sinks` are kept the same way, and any other enters the linear state and decays from then
    on. The state is then (state_BGFk, held_BGMX): sinks and window, M = N + W, X = C + k, each token's key and value.
    With a look-ahead of k steps q_t reads what is held at t + k, and the last k of the W tokens are those after t.

    With `taps` the values of the last P steps, v_t back to v_{t-P+1}, stand beside the means under `last`; the P - 1
    before a step are the last tensor of the state. Bidirectional: those of the P - 1 steps after it too. Where the
    values are narrower than x, as grouped ones are, taps are of x: those would say less than a step knows.
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
