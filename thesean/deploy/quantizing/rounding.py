"""A matrix of weights in whole numbers of 4 bits, each rounding error made up for by the weights that come after it.

After Frantar et al. 2022 (arXiv 2210.17323, "GPTQ"): what counts is X W, so an error of one row of W is spread over the
rows that are not rounded yet, by what X was on data. Rows that move X most come first, scales are found beforehand.

S samples, K features in, N out, G blocks of B rows that have one scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MOST = 15  # the largest whole number of 4 bits

# Scales are tried from the one that holds the whole range down to this share of it: to cut off the largest weight may
# round all others better.
_SHARES = torch.linspace(1.0, 0.7, 13)

# Added to the squares of features, of their mean: features that data leaves as good as undetermined stay as they are.
_DAMPING = 0.01

_AT_ONCE = 128  # rows, after which the others are told all that they have to make up for


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """weight = scale (level - zero), uint8 levels and zeros up to 15. K is filled up to whole blocks, by zeros."""

    level_KN: torch.Tensor
    scale_GN: torch.Tensor
    zero_GN: torch.Tensor

    @property
    def weight_KN(self) -> torch.Tensor:
        block = len(self.level_KN) // len(self.scale_GN)
        scale_KN, zero_KN = (v.repeat_interleave(block, 0) for v in (self.scale_GN, self.zero_GN.float()))
        return scale_KN * (self.level_KN - zero_KN)


def round_weights(weight_KN: torch.Tensor, block: int, gram_KK: torch.Tensor | None = None) -> Rounded:
    """Of a matrix; `gram_KK` is X^T X of what it is multiplied with. Without, each weight takes the nearest level."""
    missing = -len(weight_KN) % block
    weight_KN = torch.nn.functional.pad(weight_KN.float(), (0, 0, 0, missing))
    scale_GN, zero_GN = _scales(weight_KN.unflatten(0, (-1, block)))
    scale_KN, zero_KN = (v.repeat_interleave(block, 0) for v in (scale_GN, zero_GN))
    if gram_KK is None:
        level_KN = _levels(weight_KN, scale_KN, zero_KN)
    else:
        gram_KK = torch.nn.functional.pad(gram_KK.double(), (0, missing, 0, missing))
        order_K = gram_KK.diagonal().argsort(descending=True, stable=True)
        follows_KK = _follows(gram_KK[order_K][:, order_K])
        found_KN = _made_up_for(weight_KN[order_K], scale_KN[order_K], zero_KN[order_K], follows_KK)
        level_KN = torch.empty_like(found_KN)
        level_KN[order_K] = found_KN
    return Rounded(level_KN=level_KN.to(torch.uint8), scale_GN=scale_GN, zero_GN=zero_GN.to(torch.uint8))


def _levels(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return ((weight / scale).round() + zero).clamp(0, _MOST)


def _scales(weight_GBN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero of least squared error, of those that hold a share of a block's range; 0 is in it."""
    low_GN, high_GN = weight_GBN.amin(1).clamp(max=0), weight_GBN.amax(1).clamp(min=0)
    tiny = torch.finfo(torch.float32).tiny * _MOST
    best_GN, found = torch.full_like(low_GN, torch.inf), (torch.ones_like(low_GN), torch.zeros_like(low_GN))
    for share in _SHARES.tolist():
        scale_GN = ((high_GN - low_GN) * share / _MOST).clamp(min=tiny)
        zero_GN = (-low_GN * share / scale_GN).round().clamp(0, _MOST)
        tried = scale_GN, zero_GN
        level_GBN = _levels(weight_GBN, scale_GN.unsqueeze(1), zero_GN.unsqueeze(1))
        error_GN = (scale_GN.unsqueeze(1) * (level_GBN - zero_GN.unsqueeze(1)) - weight_GBN).square().sum(1)
        found = tuple(torch.where(error_GN < best_GN, a, b) for a, b in zip(tried, found, strict=True))  # type: ignore[assignment]
        best_GN = torch.minimum(error_GN, best_GN)
    return found


def _follows(gram_KK: torch.Tensor) -> torch.Tensor:
    """The upper factor U of the inverse, U^T U: an error e of row k takes e U_kj / U_kk from each row j > k."""
    square_K = gram_KK.diagonal()
    damping = _DAMPING * float(square_K.mean()) or 1.0  # nothing was seen: the identity
    lower_KK = torch.linalg.cholesky(gram_KK + damping * torch.eye(len(gram_KK), dtype=gram_KK.dtype))
    upper_KK: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True)
    return upper_KK.float()


def _made_up_for(
    weight_KN: torch.Tensor, scale_KN: torch.Tensor, zero_KN: torch.Tensor, follows_KK: torch.Tensor
) -> torch.Tensor:
    """Levels, row after row."""
    weight_KN, level_KN = weight_KN.clone(), torch.empty_like(weight_KN)
    for start in range(0, len(weight_KN), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(weight_KN)))
        error_RN = torch.empty_like(weight_KN[rows.start : rows.stop])
        for k in rows:
            level_KN[k] = _levels(weight_KN[k], scale_KN[k], zero_KN[k])
            error_N = (weight_KN[k] - scale_KN[k] * (level_KN[k] - zero_KN[k])) / follows_KK[k, k]
            weight_KN[k + 1 : rows.stop].addr_(follows_KK[k, k + 1 : rows.stop], error_N, alpha=-1)
            error_RN[k - start] = error_N
        weight_KN[rows.stop :] -= follows_KK[rows.start : rows.stop, rows.stop :].T @ error_RN
    return level_KN
