"""What a token will be worth to later ones: how much of their attention it gets once it has left a window.

B batch, T time, D width of the part, H heads of queries, G heads of keys and values, M queries that are looked at
together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
# scores that are held at once: as many as a processor's cache does
_AT_ONCE = 2**18


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
    given_HT = x_TD.new_zeros(facts.heads, time, dtype=wide(x_TD).dtype)
    for at, weights_HMT in _attention(facts, *(met_1THC[0] for met_1THC in meeting(facts, x_TD.unsqueeze(0)))):
        given_HT[:, : weights_HMT.shape[2]] += weights_HMT.tril(at - window).sum(1)
    return _by_group(facts, given_HT) / queries_T.unsqueeze(1)


@torch.no_grad()
def attention_within(
    facts: AttentionFacts, query_THC: torch.Tensor, key_THC: torch.Tensor, windows: Sequence[int]
) -> list[torch.Tensor]:
    """(T, G) for each window: the mean weight that a token's own query and those of the `window` - 1 steps after it
    give it. Of one sequence, as they are `meeting`.
    """
    time = len(key_THC)
    left_T = time - torch.arange(time, device=key_THC.device)
    given = [key_THC.new_zeros(facts.heads, time) for _ in windows]
    for at, weights_HMT in _attention(facts, query_THC, key_THC):
        for given_HT, window in zip(given, windows, strict=True):
            first = max(0, at + 1 - window)
            near_HMT = weights_HMT[..., first:].triu(at + 1 - window - first)
            given_HT[:, first : weights_HMT.shape[2]] += near_HMT.sum(1)
    pairs = zip(given, windows, strict=True)
    return [_by_group(facts, given_HT) / left_T.clamp_max(window).unsqueeze(1) for given_HT, window in pairs]


def _attention(
    facts: AttentionFacts, query_THC: torch.Tensor, key_THC: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first query, weights_HMT of it and of those after it, over the tokens up to the last of them), a few queries at
    a time: all of them would take T x T a head.
    """
    time = len(key_THC)
    few = max(1, _AT_ONCE // (facts.heads * time))
    for at, query_MHC in zip(range(0, time, few), query_THC.split(few), strict=True):
        end = at + len(query_MHC)
        scores_HMT = facts.scale * query_MHC.transpose(0, 1) @ key_THC[:end].permute(1, 2, 0)
        later_MM = torch.ones(end - at, end - at, dtype=torch.bool, device=key_THC.device).triu(1)
        scores_HMT[..., at:].masked_fill_(later_MM, -torch.inf)
        yield at, scores_HMT.softmax(-1)


def _by_group(facts: AttentionFacts, given_HT: torch.Tensor) -> torch.Tensor:
    """(T, G): the mean over the heads of a group."""
    return given_HT.unflatten(0, (facts.kv_heads, -1)).mean(1).mT


def meeting(facts: AttentionFacts, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query_BTHC and key_BTHC as they meet: normed and turned, in float32 at least."""
    query_BTHC = wide(facts.query.of(x_BTD)).unflatten(-1, (facts.heads, -1))
    return facts.met(query_BTHC, of_each_head(facts, facts.grouped(facts.kv_heads)[0], x_BTD))


def of_each_head(facts: AttentionFacts, grouped: Affine, x_BTD: torch.Tensor) -> torch.Tensor:
    """What keys or values are projected to, (B, T, H, ...): once for the heads that share them."""
    projected_BTGC = wide(grouped.of(x_BTD)).unflatten(-1, (facts.kv_heads, -1))
    return projected_BTGC.repeat_interleave(facts.heads // facts.kv_heads, 2)
