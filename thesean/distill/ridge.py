"""Ridge regression of what a layer is to give beside what it gives, from statistics that add up batch by batch.

Some examples are held out: the penalty is the one of a few that does best on them, and a layer that no solution brings
nearer there stays as it is.

B examples, T time, N rows (tokens or images), E features, O outputs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from thesean.distill.seen import rows
from thesean.errors import NumericalError
from thesean.kernels.shared.precision import wide

# Tried on what is held out, as factors of the recipe's own, which is the least.
_RIDGES = (1.0, 10.0, 100.0)
_HELD_OUT = 4  # one example in so many


def held_out(units: range, count: int, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Which of N rows are held out, N their `count`: those of one in so many of the units, examples or batches, that
    they are of.
    """
    apart_B = torch.tensor([unit % _HELD_OUT == 1 for unit in units])
    if mask_BT is not None:
        return rows(apart_B.to(mask_BT.device).unsqueeze(1).expand_as(mask_BT), mask_BT)
    return apart_B.repeat_interleave(count // len(units))


class Ridge:
    """What changes a layer so that it gives what is wanted of it."""

    def __init__(self, last: torch.nn.Linear) -> None:
        self.last, self._fitted, self._held_out = last, _Sums(last), _Sums(last)

    def add(
        self,
        features: torch.Tensor,
        wanted: torch.Tensor,
        apart_N: torch.Tensor,
        weight_N: torch.Tensor | None = None,
    ) -> None:
        """`apart_N`: which rows are held out; `weight_N`: how much the squared error of a row counts."""
        f_NE, r_NO = features.reshape(-1, self.last.in_features), wanted.reshape(-1, self.last.out_features)
        apart_N = apart_N.to(f_NE.device)
        for found, at in ((self._fitted, ~apart_N), (self._held_out, apart_N)):
            found.add(f_NE[at], r_NO[at], None if weight_N is None else weight_N[at])

    @property
    def statistics(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """What adds up over ranks."""
        return self._fitted.all, self._held_out.all

    def solve(self, ridge: float, where: str) -> None:
        """Raises NumericalError where activations are not finite."""
        self._fitted.solve(ridge, where, self._held_out)


class _Sums:
    """Running statistics of features and residuals, in double: fp32 loses the small eigenvalues."""

    def __init__(self, last: torch.nn.Linear) -> None:
        self.last = last
        like = last.weight.new_zeros((), dtype=torch.float64)
        self.count = like.clone()
        self.features_E = like.new_zeros(last.in_features)
        self.errors_O = like.new_zeros(last.out_features)
        self.covariance_EE = like.new_zeros(last.in_features, last.in_features)
        self.cross_EO = like.new_zeros(last.in_features, last.out_features)

    def add(self, features: torch.Tensor, residual: torch.Tensor, weight_N: torch.Tensor | None = None) -> None:
        """`weight_N`: how much the squared error of a row counts."""
        f_NE = features.reshape(-1, self.last.in_features)
        r_NO = residual.reshape(-1, self.last.out_features)
        error_NO = (r_NO - F.linear(wide(f_NE), wide(self.last.weight), self._bias)).double()
        f_NE = f_NE.double()
        counted_NE = f_NE if weight_N is None else f_NE * weight_N.double().unsqueeze(1)
        self.count += f_NE.shape[0] if weight_N is None else weight_N.double().sum()
        self.features_E += counted_NE.sum(0)
        self.errors_O += error_NO.sum(0) if weight_N is None else weight_N.double() @ error_NO
        self.covariance_EE.addmm_(counted_NE.T, f_NE)
        self.cross_EO.addmm_(counted_NE.T, error_NO)

    def solve(self, ridge: float, where: str, held_out: _Sums) -> None:
        """The ridge is chosen on what is held out, where anything is, and the layer stays where none helps; then those
        rows are fitted too.
        """
        if held_out.count > 0:
            # which is the best takes no more digits than single precision has, and that takes half the time
            own, theirs = self._centred(where).single(), held_out._centred(where).single()
            gains = {factor: self._solution(own, factor * ridge).gain(theirs) for factor in _RIDGES}
            best = min(gains, key=gains.__getitem__)
            if gains[best] >= 0:
                return
            ridge *= best
            for mine, more in zip(self.all, held_out.all, strict=True):
                mine += more
        solution = self._solution(self._centred(where), ridge)
        # added before it is rounded to the layer's precision
        weight_OE = wide(self.last.weight)
        self.last.weight.copy_(weight_OE + solution.weight_EO.T.to(weight_OE.dtype))
        if self._bias is not None:
            self.last.bias.copy_(self._bias + solution.bias_O.to(weight_OE.dtype))

    def _solution(self, statistics: _Centred, ridge: float) -> _Solution:
        mean_E, mean_O, covariance_EE, cross_EO = statistics
        penalised_EE = covariance_EE.clone()
        penalised_EE.diagonal().add_(ridge * covariance_EE.diagonal().mean().clamp_min(1e-12))
        delta_EO = _solved(penalised_EE, cross_EO)
        return _Solution(delta_EO, mean_O - mean_E @ delta_EO)

    def _centred(self, where: str) -> _Centred:
        finite = (self.covariance_EE, self.cross_EO)
        if not all(bool(torch.isfinite(statistic).all()) for statistic in finite):
            raise NumericalError(
                f"{where}: activations are not finite, so its last layer can't be solved. Look for NaN in the data."
            )
        mean_E, mean_O = self.features_E / self.count, self.errors_O / self.count
        if self.last.bias is None:  # nothing would add the means again: fitted about zero
            mean_E, mean_O = torch.zeros_like(mean_E), torch.zeros_like(mean_O)
        covariance_EE = (self.covariance_EE / self.count).addr_(mean_E, mean_E, alpha=-1)
        cross_EO = (self.cross_EO / self.count).addr_(mean_E, mean_O, alpha=-1)
        return _Centred(mean_E, mean_O, covariance_EE, cross_EO)

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.count, self.features_E, self.errors_O, self.covariance_EE, self.cross_EO

    @property
    def _bias(self) -> torch.Tensor | None:
        return None if self.last.bias is None else wide(self.last.bias)


class _Centred(NamedTuple):
    """Means of features and errors, the covariance of the features and theirs with the errors; all about zero, means of
    zero, for a layer without a bias.
    """

    mean_E: torch.Tensor
    mean_O: torch.Tensor
    covariance_EE: torch.Tensor
    cross_EO: torch.Tensor

    def single(self) -> _Centred:
        return _Centred(*(statistic.float() for statistic in self))


class _Solution(NamedTuple):
    """What is added to a layer's weight and bias."""

    weight_EO: torch.Tensor
    bias_O: torch.Tensor

    def gain(self, rows: _Centred) -> float:
        """By how much it changes the mean squared error of some rows: below 0 where it helps."""
        mean_E, mean_O, covariance_EE, cross_EO = rows
        spread = torch.addmm(cross_EO, covariance_EE, self.weight_EO, beta=-2).mul_(self.weight_EO).sum()
        offset_O = mean_O - mean_E @ self.weight_EO - self.bias_O
        return float(spread + offset_O.square().sum() - mean_O.square().sum())


def _solved(penalised_EE: torch.Tensor, cross_EO: torch.Tensor) -> torch.Tensor:
    """A covariance and its ridge are positive definite, unless rounding took all that the ridge added."""
    root_EE, failed = torch.linalg.cholesky_ex(penalised_EE)
    return torch.linalg.solve(penalised_EE, cross_EO) if int(failed) else torch.cholesky_solve(cross_EO, root_EE)
