"""Measures over data sets that don't fit into memory, a batch at a time.

N examples of a batch, P width of x, Q width of y
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from thesean.errors import DataError, NumericalError
from thesean.kernels.shared.dispatch import Backend
from thesean.similarity.shared.covariance import Moments
from thesean.similarity.shared.hsic import u_centred
from thesean.similarity.shared.measure import Measure
from thesean.similarity.shared.registry import check_options, get_measure, measures
from thesean.similarity.shared.rows import Flatten, rows


class Accumulator(ABC):
    """`update(x, y)` with each batch, `compute()` at any time. `examples` counts the rows so far."""

    def __init__(self, measure: Measure, flatten: Flatten) -> None:
        self.measure, self.flatten, self.examples = measure, flatten, 0

    @torch.no_grad()
    def update(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """One more batch. Raises what `similarity` raises; a batch that was refused has left no trace."""
        x_NP, y_NQ = rows("x", x, self.flatten, mask), rows("y", y, self.flatten, mask)
        self._add(x_NP, y_NQ)
        self.examples += x_NP.shape[0]

    def compute(self) -> torch.Tensor:
        """The measure of all batches, a scalar in float64. Raises DataError before the first one."""
        if not self.examples:
            raise DataError(f"{self.measure.name}: nothing to compute, update(x, y) comes first.")
        value = self._value()
        if not bool(torch.isfinite(value)):
            raise NumericalError(f"{self.measure.name}: the result is {value.item()}: the features hardly vary.")
        return value

    @abstractmethod
    def _add(self, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None: ...

    @abstractmethod
    def _value(self) -> torch.Tensor: ...


class _Mean(Accumulator):
    """Measures that are a mean over examples."""

    def __init__(self, measure: Measure, flatten: Flatten, options: dict[str, Any]) -> None:
        super().__init__(measure, flatten)
        self.options, self.total = options, torch.zeros((), dtype=torch.float64)

    def _add(self, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None:
        self.total += self.measure.value(x_NP, y_NQ, **self.options).cpu().double() * x_NP.shape[0]

    def _value(self) -> torch.Tensor:
        return self.total / self.examples


class _Minibatch(Accumulator):
    """Debiased CKA of debiased HSICs, each averaged over the batches (Nguyen et al. 2021, eq. 4)."""

    def __init__(self, measure: Measure, flatten: Flatten, backend: Backend) -> None:
        super().__init__(measure, flatten)
        self.backend = backend
        self.hsic = torch.zeros(3, dtype=torch.float64)  # xy, xx, yy

    def _add(self, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None:
        self.measure.value(x_NP, y_NQ, backend=self.backend)  # its checks: width, N, NaN, features that don't vary
        n = x_NP.shape[0]
        u, v = (u_centred(z, backend=self.backend).cpu().double().flatten() for z in (x_NP, y_NQ))
        # HSIC divides by n (n - 3); a batch counts by its examples, so that a short last one does not by more
        self.hsic += torch.stack([u.dot(v), u.dot(u), v.dot(v)]) / (n - 3)

    def _value(self) -> torch.Tensor:
        xy, xx, yy = self.hsic
        return xy / (xx * yy).sqrt()


class _Covariance(Accumulator):
    """CKA of all examples exactly, biased or debiased, from sums over examples: O((P + Q)^2) memory."""

    def __init__(self, measure: Measure, flatten: Flatten) -> None:
        super().__init__(measure, flatten)
        self.moments = Moments()

    def _add(self, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None:
        get_measure("mse").value(x_NP[:, :1], y_NQ[:, :1])  # its checks: shapes, dtypes, devices, N
        if not bool(x_NP.isfinite().all() and y_NQ.isfinite().all()):
            raise NumericalError(f"{self.measure.name}: a batch holds values that are NaN or infinite.")
        self.moments.add(x_NP, y_NQ)

    def _value(self) -> torch.Tensor:
        if self.examples < 4:
            raise DataError(f"{self.measure.name}: expected at least 4 examples, found {self.examples}.")
        return self.moments.cka(debiased=self.measure.name == "cka-debiased")


class _NormalizedError(Accumulator):
    """Squared error and variance, summed apart."""

    def __init__(self, measure: Measure, flatten: Flatten) -> None:
        super().__init__(measure, flatten)
        self.error = torch.zeros((), dtype=torch.float64)
        self.shift_P: torch.Tensor | None = None
        self.sum_P = self.squares = torch.zeros((), dtype=torch.float64)

    def _add(self, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None:
        error = get_measure("mse").value(x_NP, y_NQ) * x_NP.numel()
        wide_NP = y_NQ.cpu().double()
        if self.shift_P is None:
            self.shift_P = wide_NP.mean(0)
        wide_NP = wide_NP - self.shift_P
        self.error += error.cpu().double()
        self.sum_P = self.sum_P + wide_NP.sum(0)
        self.squares = self.squares + wide_NP.square().sum()

    def _value(self) -> torch.Tensor:
        return self.error / (self.squares - self.sum_P.square().sum() / self.examples)


def accumulate(
    measure: str = "cka-debiased", *, flatten: Flatten = "example", exact: bool = False, **options: Any
) -> Accumulator:
    """A measure over batches: `.update(x, y, mask=None)` for each, then `.compute()`.

        running = thesean.similarity.accumulate("cka-debiased")
        for x, y in batches:
            running.update(x, y)
        print(running.compute())

    `additive` measures and "nmse" are those of all examples at once. "cka-debiased" averages the debiased HSIC over
    batches of at least 4 examples and keeps its three sums; the batches' size does not bias it, their number makes it
    precise. `exact=True` gives it of all examples at once, from float64 sums of (P + Q)^2 numbers; only so does
    "cka", whose bias depends on the batches' size. Nothing carries a gradient.

    Raises UnknownNameError, TypeError for an option that the measure does not have, and DataError for a measure that
    batches don't determine.
    """
    chosen = get_measure(measure)
    check_options(chosen, options)
    if chosen.additive:
        return _Mean(chosen, flatten, options)
    if chosen.name == "nmse":
        return _NormalizedError(chosen, flatten)
    backend = options.pop("backend", "auto")
    if chosen.name in ("cka", "cka-debiased") and not options:
        if exact:
            if backend == "triton":
                raise DataError(f"{chosen.name}: exact=True adds up in torch. Leave backend='triton' out.")
            return _Covariance(chosen, flatten)
        if chosen.name == "cka-debiased":
            return _Minibatch(chosen, flatten, backend)
        raise DataError(
            "cka: its bias depends on the size of the batches, so they can't be averaged. Use 'cka-debiased', or "
            "exact=True, which holds the features' covariances."
        )
    means = ", ".join(name for name in measures() if name == "nmse" or get_measure(name).additive)
    raise DataError(
        f"{chosen.name}: the value of all examples does not follow from batches. Use 'cka-debiased', or a measure that "
        f"is a mean over examples: {means}."
    )
