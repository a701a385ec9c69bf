"""Which features of a layer to keep so that a linear map of them loses least, and that map without the others.

Greedy forward selection with the output in view. With C the features' covariance and W the map, keeping a set S and
refitting loses tr(W R W'), R = C - C_:S C_SS^-1 C_S: (the Schur complement). Each step is a step of a Cholesky
factorisation of C whose pivot is the feature with the largest decrease of that loss, |W R_:i|^2 / R_ii (orthogonal
least squares: Chen, Billings and Luo 1989; plain pivoted Cholesky takes the largest R_ii and knows nothing of W).

E features, O outputs, S features kept, G features of a group, P pool, N examples
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# Pivots that are taken before the statistics of all features are updated, as one matrix product, and from how many
# candidates: on the demo's guide the loss is within 1% of one pivot at a time, and it is 10 times faster at E = 3072.
BLOCK = 16
POOL = 64

# Of the largest variance: what a feature still adds below this is rounding.
NEGLIGIBLE = 1e-10

# Ridge penalties that `fold` solves with, each taken from what the last one left. Three settle it where there is
# noise; where there is none it vanishes, squared at each step.
_PENALTIES = 5
_SETTLED = 0.1


@dataclass(frozen=True)
class FeatureMoments:
    """Mean and covariance over `count` examples, in double."""

    count: int
    mean_E: torch.Tensor
    covariance_EE: torch.Tensor


@torch.no_grad()
def moments(batches: Iterable[torch.Tensor]) -> FeatureMoments:
    """Of (..., E) features. Raises ValueError without examples or where they are not finite."""
    count = 0
    shift_E = sum_E = sum_EE = torch.zeros(0)
    for batch in batches:
        f_NE = batch.flatten(0, -2).double()
        if count == 0:
            shift_E = f_NE.mean(0)  # E[ff'] - mm' alone cancels where the mean is large
            sum_E, sum_EE = torch.zeros_like(shift_E), torch.zeros(2 * shift_E.shape).to(shift_E)
        f_NE = f_NE - shift_E
        count += len(f_NE)
        sum_E += f_NE.sum(0)
        sum_EE.addmm_(f_NE.T, f_NE)
    if count == 0:
        raise ValueError("there are no examples")
    mean_E = sum_E / count
    covariance_EE = sum_EE / count - torch.outer(mean_E, mean_E)
    if not bool(torch.isfinite(covariance_EE).all()):
        raise ValueError("activations are not finite")
    return FeatureMoments(count, mean_E + shift_E, covariance_EE)


@torch.no_grad()
def select_features(covariance_EE: torch.Tensor, weight_OE: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` features to keep, ascending. O(E^2 count + O E count), in double."""
    rest_EE = covariance_EE.double().clone()
    effect_OE = weight_OE.double() @ rest_EE
    floor = NEGLIGIBLE * rest_EE.diagonal().max()
    kept = torch.zeros(len(rest_EE), dtype=torch.bool, device=rest_EE.device)
    while (missing := count - int(kept.sum())) > 0:
        gain_E = _gain(rest_EE, effect_OE, kept, floor)
        pool_P = gain_E.topk(min(POOL, len(gain_E))).indices
        picked = _pick(rest_EE[pool_P][:, pool_P], effect_OE[:, pool_P], kept[pool_P], min(BLOCK, missing), floor)
        if not picked:
            break
        chosen_S = pool_P[picked]
        _eliminate(rest_EE, effect_OE, chosen_S)
        kept[chosen_S] = True
    if (missing := count - int(kept.sum())) > 0:
        # what is left adds nothing; the widest variances first, so that the choice is one and the same each time
        kept[covariance_EE.diagonal().masked_fill(kept, -torch.inf).topk(missing).indices] = True
    return kept.nonzero().flatten()


def _pick(
    rest_PP: torch.Tensor, effect_OP: torch.Tensor, kept_P: torch.Tensor, count: int, floor: torch.Tensor
) -> list[int]:
    """Up to `count` pivots, one at a time, among the candidates of a pool."""
    rest_PP, effect_OP, kept_P = rest_PP.clone(), effect_OP.clone(), kept_P.clone()
    picked: list[int] = []
    for _ in range(count):
        gain_P = _gain(rest_PP, effect_OP, kept_P, floor)
        best = int(gain_P.argmax())
        if gain_P[best] < 0:
            break
        picked.append(best)
        kept_P[best] = True
        _eliminate(rest_PP, effect_OP, torch.tensor([best], device=rest_PP.device))
    return picked


def _gain(rest_EE: torch.Tensor, effect_OE: torch.Tensor, kept_E: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """How much each feature lowers the loss; -1 for those kept and those that add nothing new."""
    variance_E = rest_EE.diagonal()
    gain_E = effect_OE.square().sum(0) / variance_E.clamp_min(floor)
    return gain_E.masked_fill(kept_E | (variance_E <= floor), -1)


def _eliminate(rest_EE: torch.Tensor, effect_OE: torch.Tensor, chosen_S: torch.Tensor) -> None:
    """Take what the chosen features explain out of R and W R, in place."""
    factor_SS = torch.linalg.cholesky(rest_EE[chosen_S][:, chosen_S])
    rows_SE = torch.linalg.solve_triangular(factor_SS, rest_EE[chosen_S], upper=False)
    effect_SO = torch.linalg.solve_triangular(factor_SS, effect_OE[:, chosen_S].T, upper=False)
    rest_EE.addmm_(rows_SE.T, rows_SE, alpha=-1)
    effect_OE.addmm_(effect_SO.T, rows_SE, alpha=-1)


@torch.no_grad()
def select_groups(covariance_EE: torch.Tensor, weight_OE: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """The `count` groups of `size` neighbouring features to keep, ascending: the same rule, a whole group a step."""
    groups = torch.arange(len(covariance_EE), device=covariance_EE.device).split(size)
    rest_EE = covariance_EE.double().clone()
    # a group may hold features that depend on one another: the factorisation needs a little on the diagonal
    rest_EE.diagonal().add_(1e-8 * rest_EE.diagonal().mean().clamp_min(1e-300))
    effect_OE = weight_OE.double() @ rest_EE
    kept: list[int] = []
    for _ in range(count):
        best, most = -1, -1.0
        for group, at_G in enumerate(groups):
            if group in kept:
                continue
            factor_GG = torch.linalg.cholesky(rest_EE[at_G][:, at_G])
            effect_GO = torch.linalg.solve_triangular(factor_GG, effect_OE[:, at_G].T, upper=False)
            gain = float(effect_GO.square().sum())
            if gain > most:
                best, most = group, gain
        kept.append(best)
        _eliminate(rest_EE, effect_OE, groups[best])
    return torch.tensor(sorted(kept), device=rest_EE.device)


@torch.no_grad()
def fold(known: FeatureMoments, weight_OE: torch.Tensor, kept_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of the kept features that stands in for the whole: weight_OS, and what is added to the bias, bias_O.

    Minimises E|W f - W' f_S - b|^2 + lambda |W' - W_S|^2 over W' and b: what the kept features don't say of the others
    leaves the guide's own weights as they are. lambda = S s^2 / (N |W' - W_S|^2), s^2 what stays unexplained (Hoerl,
    Kennard and Baldwin 1975, iterated), at most S / N of the mean variance: with few examples nothing is fitted to
    noise, and features that can stand in for the others exactly do so.
    """
    weight_OE = weight_OE.double()
    dropped = torch.ones(weight_OE.shape[1], dtype=torch.bool, device=weight_OE.device)
    dropped[kept_S] = False
    dropped_R = dropped.nonzero().flatten()
    gone_OR, covariance_EE = weight_OE[:, dropped_R], known.covariance_EE
    kept_SS = covariance_EE[kept_S][:, kept_S]
    cross_OS = gone_OR @ covariance_EE[dropped_R][:, kept_S]
    total = ((gone_OR @ covariance_EE[dropped_R][:, dropped_R]) * gone_OR).sum()
    variance = kept_SS.diagonal().mean().clamp_min(1e-12)
    share = len(kept_S) / known.count
    most = penalty = share * variance
    for _ in range(_PENALTIES):
        ridge_SS = kept_SS.clone()
        ridge_SS.diagonal().add_(penalty.clamp_min(1e-12 * variance))
        change_OS = torch.cholesky_solve(cross_OS.T, torch.linalg.cholesky(ridge_SS)).T
        unexplained = total + ((change_OS @ kept_SS - 2 * cross_OS) * change_OS).sum()
        squares = change_OS.square().sum().clamp_min(1e-300)
        before, penalty = penalty, torch.minimum(most, share * unexplained.clamp_min(0) / squares)
        if (penalty - before).abs() <= _SETTLED * before:
            break
    bias_O = gone_OR @ known.mean_E[dropped_R] - change_OS @ known.mean_E[kept_S]
    return weight_OE[:, kept_S] + change_OS, bias_O
