"""How near an attention looks: what of it a window over the last tokens would hold, measured on the guide's own input.

B batch, T time, D width, H heads, K head width of queries and keys, V of values, M queries that are looked at
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thesean.kernels.shared.precision import wide
from thesean.targets.shared.facts import AttentionFacts
from thesean.targets.shared.worth import meeting

# Queries are spread over the last three quarters of so many tokens of so many rows: all would take time quadratic in
# the length.
_QUERIES, _TOKENS, _ROWS = 64, 1024, 4
_SHORTEST = 16


@torch.no_grad()
def window_errors(
    facts: AttentionFacts,
    x_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None,
    windows: Sequence[int],
    sinks: int,
) -> dict[int, float]:
    """Window -> squared error of a causal attention that sees the last `window` tokens and the first `sinks` alone, as
    a share of its output's variance from token to token; at 0, of the plain mean of all tokens so far. `mask_BT` is
    True at tokens. Empty where rows are too short to tell.
    """
    wanted: list[torch.Tensor] = []
    found: dict[int, list[torch.Tensor]] = {window: [] for window in (0, *windows)}
    for row in range(min(len(x_BTD), _ROWS)):
        x_TD = x_BTD[row] if mask_BT is None else x_BTD[row][mask_BT[row]]
        if len(x_TD) < _SHORTEST:
            continue
        scores_HMT, value_HTV, age_MT = _scores(facts, x_TD[:_TOKENS])
        wanted.append(_outputs(facts, scores_HMT, value_HTV))
        first_T = torch.arange(age_MT.shape[1], device=age_MT.device) < sinks
        found[0].append(_outputs(facts, torch.where(scores_HMT > -torch.inf, 0.0, scores_HMT), value_HTV))
        for window in windows:
            seen_MT = (age_MT < window) | first_T
            found[window].append(_outputs(facts, scores_HMT.masked_fill(~seen_MT, -torch.inf), value_HTV))
    if not wanted:
        return {}
    wanted_MD = torch.cat(wanted)
    spread = (wanted_MD - wanted_MD.mean(0)).square().sum()
    errors = {window: (torch.cat(outputs) - wanted_MD).square().sum() for window, outputs in found.items()}
    return {window: float(error / spread) for window, error in errors.items()}


def _scores(facts: AttentionFacts, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of some queries, -inf at later tokens, values, and how old each token is to each query."""
    query, key = meeting(facts, x_TD)
    value = wide(facts.value.of(x_TD)).unflatten(-1, (facts.heads, -1))
    time = len(x_TD)
    at_M = torch.linspace(time // 4, time - 1, min(_QUERIES, time - time // 4), device=x_TD.device).long()
    scores_HMT = facts.scale * query[at_M].transpose(0, 1) @ key.permute(1, 2, 0)
    if facts.bias is not None:
        scores_HMT = scores_HMT + facts.bias.matrix(time, scores_HMT)[:, at_M]
    age_MT = at_M.unsqueeze(1) - torch.arange(time, device=x_TD.device)
    return scores_HMT.masked_fill(age_MT < 0, -torch.inf), value.transpose(0, 1), age_MT


def _outputs(facts: AttentionFacts, scores_HMT: torch.Tensor, value_HTV: torch.Tensor) -> torch.Tensor:
    mixed_HMV = scores_HMT.softmax(-1) @ value_HTV
    return facts.output.of(mixed_HMV.transpose(0, 1).flatten(1))
