"""What a measure is, and the checks that all of them share.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from thesean.errors import DataError, NumericalError, TheseanError
from thesean.kernels.shared.precision import full_precision, widen

Side = Literal["x", "y"]
CHANGES = frozenset({"rotation", "scale", "shift"})


class EvaluationOnlyError(TheseanError, TypeError):
    """A measure without a useful gradient was asked for a loss."""


def _as_it_is(y_NQ: torch.Tensor) -> Any:
    return y_NQ.detach()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How alike two sets of activations are. A file in this folder that defines `MEASURE` registers it.

    `value` and `loss` take x_NP and y_NQ to a scalar, in float32 or where a side is in float64, and are checked: they
    raise DataError for inputs that the measure has no answer for, NumericalError for NaN and infinities. `loss` is
    zero for identical activations, never below, and falls as they grow alike, whichever way `value` goes.
    `prepare(y_NQ)` does the guide's share of the work once; `value` and `loss` take its result in place of y_NQ.
    A measure without a `loss` is for evaluation: its value carries no gradient, its loss raises EvaluationOnlyError.

    `blind_to` names what may happen to one side alone without a difference, with the default options: "rotation" of the
    features (by any orthogonal matrix), "scale" (all of them times one number above 0), "shift" (the same vector added
    to each example). `additive` measures are means over examples: averaged over batches they are exact.
    `takes_half`: half precision reaches the formula as it is, for a kernel that reads it so and adds up in float32. Any
    other formula gets both sides in one dtype, float32 at least, and need not think of it.
    """

    name: str
    summary: str
    value: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor] = None  # type: ignore[assignment]  # filled in below
    min_examples: int = 1
    same_width: bool = False
    higher_is_better: bool = True
    must_vary: tuple[Side, ...] = ()  # sides that may not be the same for all examples
    blind_to: frozenset[str] = frozenset()
    additive: bool = False
    takes_half: bool = False
    prepare: Callable[..., Any] = _as_it_is
    differentiable: bool = field(init=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.blind_to) - CHANGES)
        if unknown:
            raise ValueError(f"{self.name}: blind_to: expected some of {sorted(CHANGES)}, found {unknown[0]!r}.")
        object.__setattr__(self, "blind_to", frozenset(self.blind_to))
        # wrapped here, so that a measure's file is the formula alone and no caller can forget the checks
        object.__setattr__(self, "differentiable", self.loss is not None)
        object.__setattr__(self, "value", _checked(self, self.value))
        object.__setattr__(self, "loss", _checked(self, self.loss) if self.differentiable else _refused(self))
        object.__setattr__(self, "prepare", _checked_side(self, self.prepare))


def _checked(measure: Measure, compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(compute)
    def run(x_NP: torch.Tensor, y_NQ: Any, **options: Any) -> torch.Tensor:
        _check_side(measure, "x", x_NP)
        if isinstance(y_NQ, torch.Tensor):  # a prepared y was checked when it was made
            _check_side(measure, "y", y_NQ)
            if x_NP.device != y_NQ.device:
                raise DataError(f"{measure.name}: x is on {x_NP.device}, y on {y_NQ.device}. Move one: x.to(y.device).")
        if x_NP.shape[0] != y_NQ.shape[0]:
            raise DataError(
                f"{measure.name}: expected as many examples in x as in y, found {x_NP.shape[0]} and {y_NQ.shape[0]}. "
                "Row i of both must come from the same example."
            )
        if measure.same_width and x_NP.shape[1] != y_NQ.shape[1]:
            raise DataError(
                f"{measure.name}: expected x and y of the same width, found {x_NP.shape[1]} and {y_NQ.shape[1]}. "
                "Use measure='cka', which compares different widths."
            )
        dtype = _result_dtype(x_NP, y_NQ)
        if not measure.differentiable:  # sorting and LAPACK don't hand NaN on
            _check_finite(measure, "x", x_NP)
            if isinstance(y_NQ, torch.Tensor):
                _check_finite(measure, "y", y_NQ)
        try:
            with full_precision(x_NP.device), nullcontext() if measure.differentiable else torch.no_grad():
                result = compute(*_as_taken(measure, x_NP, y_NQ), **options).to(dtype)
        except torch.linalg.LinAlgError:
            result = x_NP.new_tensor(torch.nan, dtype=dtype)
        if not bool(torch.isfinite(result)):  # the inputs are only searched once something is wrong
            _check_finite(measure, "x", x_NP)
            if isinstance(y_NQ, torch.Tensor):
                _check_finite(measure, "y", y_NQ)
            raise NumericalError(
                f"{measure.name}: the result is {result.item()} for finite inputs: they hardly vary across examples, "
                "or their squares overflow. Rescale them, or use more examples."
            )
        return result

    return run


def _as_taken(measure: Measure, *sides: Any) -> tuple[Any, ...]:
    """The sides as the formula takes them: in one dtype, float32 at least, unless a kernel sees to that itself."""
    if measure.takes_half:
        return sides
    wide = iter(widen(*(side for side in sides if isinstance(side, torch.Tensor))))
    return tuple(next(wide) if isinstance(side, torch.Tensor) else side for side in sides)


def _result_dtype(*sides: Any) -> torch.dtype:
    dtypes = (side.dtype for side in sides if isinstance(side, torch.Tensor))  # a prepared side follows the other
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _refused(measure: Measure) -> Callable[..., torch.Tensor]:
    def refuse(x_NP: torch.Tensor, y_NQ: Any, **options: Any) -> torch.Tensor:
        raise EvaluationOnlyError(
            f"{measure.name}: evaluation only, it has no gradient to train on. Train on 'cka', 'dmnn', 'rsa' or "
            "'procrustes', and report this one."
        )

    return refuse


def _checked_side(measure: Measure, prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def run(y_NQ: torch.Tensor, **options: Any) -> Any:
        _check_side(measure, "y", y_NQ)
        _check_finite(measure, "y", y_NQ)
        with full_precision(y_NQ.device), torch.no_grad():
            return prepare(*_as_taken(measure, y_NQ), **options)

    return run


def _check_side(measure: Measure, name: Side, x_NP: torch.Tensor) -> None:
    if x_NP.ndim != 2 or not x_NP.is_floating_point():
        raise DataError(
            f"{measure.name}: expected {name} of (examples, width) and a floating dtype, found "
            f"{tuple(x_NP.shape)} of {x_NP.dtype}. similarity() flattens more dimensions."
        )
    if x_NP.shape[0] < measure.min_examples:
        raise DataError(
            f"{measure.name}: expected at least {measure.min_examples} examples, found {x_NP.shape[0]} in {name}. "
            "Use a larger batch, or flatten='token' to count tokens."
        )
    if x_NP.shape[1] == 0:
        raise DataError(f"{measure.name}: {name} has no features: its shape is {tuple(x_NP.shape)}.")
    # the first two rows nearly always differ: then the rest need not be read
    if name in measure.must_vary and torch.equal(x_NP[0], x_NP[1]) and bool((x_NP == x_NP[0]).all()):
        raise DataError(
            f"{measure.name}: {name} is constant, the same for all {x_NP.shape[0]} examples, so there is nothing to "
            "compare. Look for a dead layer, or choose another part."
        )


def _check_finite(measure: Measure, name: Side, x_NP: torch.Tensor) -> None:
    bad_NP = ~torch.isfinite(x_NP)
    if bool(bad_NP.any()):
        row, column = (int(i) for i in bad_NP.nonzero()[0])
        raise NumericalError(
            f"{measure.name}: {name} holds {int(bad_NP.sum())} values that are NaN or infinite, the first at example "
            f"{row}, feature {column}. Lower the learning rate, or look at the layer's inputs."
        )
