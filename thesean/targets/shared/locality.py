"""How near an attention looks: what of it a window over the last tokens would hold, measured on the guide's own input.

B batch, T time, D width, H heads, G heads of keys and values, C width of queries and keys, V of values, M queries that
are looked at, K tokens that are kept
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from thesean.targets.shared.facts import AttentionFacts
from thesean.targets.shared.worth import attention_within, meeting, of_each_head

# Queries are spread over the last three quarters of so many tokens of so many rows: all would take time quadratic in
# the length.
_QUERIES, _TOKENS, _ROWS = 64, 1024, 4
_SHORTEST = 16

Choice = TypeVar("Choice")


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

    def choices(row: Row) -> Iterator[tuple[int, torch.Tensor]]:
        first_T = torch.arange(row.age_MT.shape[1], device=row.age_MT.device) < sinks
        yield 0, row.alike()
        for window in windows:
            yield window, row.seeing((row.age_MT < window) | first_T)

    return _shares(facts, rows(facts, x_BTD, mask_BT), choices)


@torch.no_grad()
def held_errors(
    facts: AttentionFacts, x_BTD: torch.Tensor, mask_BT: torch.Tensor | None, sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """(window, kept) -> the same error of one that sees the last `window` tokens and `kept` of those before: those that
    got most attention while they were in the window, which stands for what is foretold, and needs nothing solved. At
    (0, 0), of the plain mean of all tokens so far.
    """
    windows = sorted({window for window, _ in sizes})

    def choices(row: Row) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        yield (0, 0), row.alike()
        got = dict(zip(windows, attention_within(facts, row.query_THC, row.key_THC, windows), strict=True))
        for window, kept in sizes:
            yield (window, kept), row.seeing(row.keeping(got[window].mT, window, kept))

    return _shares(facts, rows(facts, x_BTD, mask_BT), choices)


class Row(NamedTuple):
    """Queries and keys of a sequence as they meet, scores of some of the queries, -inf at later tokens, values, and how
    old each token is to each of these queries.
    """

    x_TD: torch.Tensor
    query_THC: torch.Tensor
    key_THC: torch.Tensor
    scores_HMT: torch.Tensor
    value_HTV: torch.Tensor
    age_MT: torch.Tensor

    def alike(self) -> torch.Tensor:
        """Scores by which all tokens so far count the same."""
        return torch.where(self.scores_HMT > -torch.inf, 0.0, self.scores_HMT)

    def seeing(self, seen: torch.Tensor) -> torch.Tensor:
        return self.scores_HMT.masked_fill(~seen, -torch.inf)

    def keeping(self, worth_GT: torch.Tensor, window: int, kept: int) -> torch.Tensor:
        """(H, M, T): the last `window` tokens, and of those before the `kept` that are worth most."""
        left_MT = self.age_MT >= window
        worth_GMT = worth_GT.unsqueeze(1).masked_fill(~left_MT, -torch.inf)
        best_GMK = worth_GMT.topk(min(kept, worth_GMT.shape[-1]), -1).indices
        kept_GMT = torch.zeros_like(worth_GMT, dtype=torch.bool).scatter(-1, best_GMK, True) & left_MT
        return (~left_MT | kept_GMT).repeat_interleave(len(self.scores_HMT) // len(worth_GT), 0)


def rows(facts: AttentionFacts, x_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> Iterator[Row]:
    x_BTD = x_BTD[:_ROWS]
    if mask_BT is None:
        x_BTD = x_BTD[:, :_TOKENS]
        alike = x_BTD.split(max(1, _TOKENS // x_BTD.shape[1]))  # projected together
    else:
        alike = tuple(x_TD[seen_T][:_TOKENS].unsqueeze(0) for x_TD, seen_T in zip(x_BTD, mask_BT, strict=False))
    for x_BTD in alike:
        time = x_BTD.shape[1]
        if time < _SHORTEST:
            continue
        query_BTHC, key_BTHC = meeting(facts, x_BTD)
        value_BTHV = of_each_head(facts, facts.grouped(facts.kv_heads)[1], x_BTD)
        at_M = torch.linspace(time // 4, time - 1, min(_QUERIES, time - time // 4), device=x_BTD.device).long()
        age_MT = at_M.unsqueeze(1) - torch.arange(time, device=x_BTD.device)
        for x_TD, query_THC, key_THC, value_THV in zip(x_BTD, query_BTHC, key_BTHC, value_BTHV, strict=True):
            scores_HMT = facts.scale * query_THC[at_M].transpose(0, 1) @ key_THC.permute(1, 2, 0)
            if facts.bias is not None:
                scores_HMT = scores_HMT + facts.bias.matrix(time, scores_HMT)[:, at_M]
            scores_HMT = scores_HMT.masked_fill(age_MT < 0, -torch.inf)
            yield Row(x_TD, query_THC, key_THC, scores_HMT, value_THV.transpose(0, 1), age_MT)


def _shares(
    facts: AttentionFacts, rows: Iterable[Row], choices: Callable[[Row], Iterator[tuple[Choice, torch.Tensor]]]
) -> dict[Choice, float]:
    """Choice -> squared error of what comes of its scores, as a share of the variance of what the guide's come to."""
    whole: list[torch.Tensor] = []
    found: dict[Choice, list[torch.Tensor]] = {}
    for row in rows:
        whole.append(_mixed(row.scores_HMT, row))
        for choice, scores_HMT in choices(row):
            found.setdefault(choice, []).append(_mixed(scores_HMT, row))
    if not whole:
        return {}
    wanted_MD = facts.output.of(torch.cat(whole))
    spread = (wanted_MD - wanted_MD.mean(0)).square().sum()
    errors = {choice: (facts.output.of(torch.cat(mixed)) - wanted_MD).square().sum() for choice, mixed in found.items()}
    return {choice: float(error / spread) for choice, error in errors.items()}


def _mixed(scores_HMT: torch.Tensor, row: Row) -> torch.Tensor:
    """What the output projection reads, (M, H V)."""
    return (scores_HMT.softmax(-1) @ row.value_HTV).transpose(0, 1).flatten(1)
