"""Several linear maps of one input through few numbers that they share, nearest on the activations that were seen.

I inputs, N outputs of all maps, R numbers that are shared, K outputs of one map
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Of the largest: what a map's outputs count for in their least direction is no less, so that it can be divided by.
_FLOOR = 1e-4


class Shared(NamedTuple):
    """weight_NI is nearly up_NR @ down_RI; `lost` is the squared error that the metrics leave."""

    down_RI: torch.Tensor
    up_NR: torch.Tensor
    lost: float


class Root(NamedTuple):
    """A symmetric square root, and its inverse."""

    root_KK: torch.Tensor
    inverse_KK: torch.Tensor


def root(metric_KK: torch.Tensor) -> Root:
    """Of a positive metric in double; one that is zero counts as the unit."""
    values_K, vectors_KK = torch.linalg.eigh(metric_KK)
    largest = values_K.abs().max()
    if not largest > 0:
        values_K = torch.ones_like(values_K)
    roots_K = values_K.clamp_min(_FLOOR * values_K.abs().max()).sqrt()
    return Root((vectors_KK * roots_K) @ vectors_KK.mH, (vectors_KK / roots_K) @ vectors_KK.mH)


def share(weights: Sequence[torch.Tensor], covariance_II: torch.Tensor, metrics: Sequence[Root], rank: int) -> Shared:
    """min over up, down of sum_m E|A_m (W_m - up_m down) x|^2, A_m the root of the m-th map's metric, x of this
    covariance: with L the A_m W_m below one another and U the first eigenvectors of L C L', down = U' L and
    up_m = A_m^-1 U_m (Eckart and Young 1936, in the metric of the activations). Complex maps too. At full rank
    nothing is lost, whatever the metrics.
    """
    rows_NI = torch.cat([m.root_KK @ weight_KI for m, weight_KI in zip(metrics, weights, strict=True)])
    values_N, vectors_NN = torch.linalg.eigh(rows_NI @ covariance_II.to(rows_NI) @ rows_NI.mH)
    kept_NR = vectors_NN[:, len(rows_NI) - rank :].flip(1)  # eigh ascends
    parts = kept_NR.split([len(weight_KI) for weight_KI in weights])
    up_NR = torch.cat([m.inverse_KK @ part_KR for m, part_KR in zip(metrics, parts, strict=True)])
    return Shared(kept_NR.mH @ rows_NI, up_NR, float(values_N[: len(rows_NI) - rank].clamp_min(0).sum()))
