"""What a token will be worth to later ones: how much of their attention it gets once it has left a window.

T time, D width of the part, H heads of queries, G heads of keys and values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from thesean.kernels.shared.precision import wide
from thesean.targets.shared.facts import Affine, AttentionFacts

# Of a sequence, and of all: attention of everything to everything takes time and memory quadratic in the length.
_LONGEST, _TOKENS = 2048, 32768
# queries that a token must be seen by for its mean to be told, as a share of the window, and at least
_SEEN, _FEWEST = 0.5, 8
# of attention: what is never looked at has no logarithm
_FLOOR = 1e-5
# relative to each feature's variance
_RIDGE = 0.1
# Tokens count by this power of what they are worth: else the few that are looked at always, one in a sequence, are
# taken for less than they are, and fall behind in sequences longer than those that were seen.
_COUNTS = 0.25


@torch.no_grad()
def foretell(facts: AttentionFacts, inputs: Sequence[torch.Tensor], window: int) -> Affine | None:
    """The affine map x_D -> G logarithms of a token's mean attention from those `window` steps after it and later, by
    ridge regression on whole sequences x_BTD; None where none is long enough.
    """
    width, sums, tokens = inputs[0].shape[-1], None, 0
    for x_TD in (row_TD for x_BTD in inputs for row_TD in x_BTD[:, :_LONGEST]):
        told = len(x_TD) - window - max(_FEWEST, int(_SEEN * window))
        if told < _FEWEST or tokens >= _TOKENS:
            continue
        worth_NG = attention_past(facts, x_TD, window)[:told] + _FLOOR
        both = torch.cat([wide(x_TD[:told]), worth_NG.log(), torch.ones_like(worth_NG[:, :1])], 1).double()
        product = (both * worth_NG.mean(1, keepdim=True).double() ** _COUNTS).mT @ both
        sums, tokens = product if sums is None else sums + product, tokens + told
    if sums is None:
        return None
    sums /= sums[-1, -1].clone()
    mean = sums[-1]
    spread = sums - torch.outer(mean, mean)
    covariance_DD, cross_DG = spread[:width, :width].clone(), spread[:width, width:-1]
    covariance_DD.diagonal().mul_(1 + _RIDGE).add_(1e-9 * covariance_DD.diagonal().mean() + 1e-12)
    weight_GD = torch.linalg.solve(covariance_DD, cross_DG).mT
    return Affine(weight_GD.float(), (mean[width:-1] - weight_GD @ mean[:width]).float())


@torch.no_grad()
def attention_past(facts: AttentionFacts, x_TD: torch.Tensor, window: int) -> torch.Tensor:
    """(T, G): the mean weight that queries `window` steps after a token and later give it, in all heads of a group."""
    time = len(x_TD)
    queries_T = (time - window - torch.arange(time, device=x_TD.device)).clamp_min(1)
    (found_TG,) = _attention(facts, x_TD, lambda weights_TT: [weights_TT.tril(-window)])
    return found_TG / queries_T.unsqueeze(1)


@torch.no_grad()
def attention_within(facts: AttentionFacts, x_TD: torch.Tensor, windows: Sequence[int]) -> list[torch.Tensor]:
    """(T, G) for each window: the mean weight that a token's own query and those of the `window` - 1 steps after it
    give it.
    """
    left_T = len(x_TD) - torch.arange(len(x_TD), device=x_TD.device)
    found = _attention(facts, x_TD, lambda weights_TT: [weights_TT.triu(1 - window) for window in windows])
    return [f / left_T.clamp_max(window).unsqueeze(1) for f, window in zip(found, windows, strict=True)]


def _attention(
    facts: AttentionFacts, x_TD: torch.Tensor, parts: Callable[[torch.Tensor], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """For each part of all weights_TT, what it gives each token: (T, G), the mean over the heads of a group."""
    query_THC, key_THC = meeting(facts, x_TD)
    time, repeats = len(x_TD), facts.heads // facts.kv_heads
    step_T = torch.arange(time, device=x_TD.device)
    later_TT = step_T.unsqueeze(1) < step_T
    found: list[list[torch.Tensor]] = []
    for head in range(facts.heads):  # one at a time: each takes T x T
        scores_TT = facts.scale * query_THC[:, head] @ key_THC[:, head].mT
        weights_TT = scores_TT.masked_fill(later_TT, -torch.inf).softmax(-1)
        found.append([part_TT.sum(0) for part_TT in parts(weights_TT)])
    return [torch.stack(heads).unflatten(0, (-1, repeats)).mean(1).mT for heads in zip(*found, strict=True)]


def meeting(facts: AttentionFacts, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query_THC and key_THC as they meet: normed and turned, in float32 at least."""
    query_1THC, key_1THC = (
        wide(affine.of(x_TD)).unflatten(-1, (facts.heads, -1)).unsqueeze(0) for affine in (facts.query, facts.key)
    )
    query_1THC, key_1THC = facts.met(query_1THC, key_1THC)
    return query_1THC[0], key_1THC[0]
