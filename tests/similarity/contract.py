"""What holds for every measure: `check_measure(measure)` runs it on one, registered or not.

Each check raises AssertionError with the measure's name, what was found and what was expected. Sides are drawn from a
seed, so that a failure repeats. N examples, P width
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from tests.tolerances import GRADIENT, relative_error
from thesean.errors import DataError, NumericalError
from thesean.similarity import EvaluationOnlyError, Measure, similarity

Size = tuple[int, int]
HALF = (torch.float16, torch.bfloat16)
OFFSETS = (0.0, 30.0, 300.0)  # the larger ones cost uncentred code all its digits
CHANGES = ("rotation", "scale", "shift")


def features(size: Size, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fitting(measure: Measure, size: Size) -> Size:
    """`size`, with enough examples: more than both sides' features where a measure has no answer for wide ones."""
    n, p = max(size[0], measure.min_examples), size[1]
    few = max(8, measure.min_examples)
    try:
        measure.value(features((few, 8 * few), 0), features((few, 8 * few), 1))
    except DataError:
        # canonical correlations: where the two spaces must meet, some are 1 and their directions are arbitrary
        return n + 2 * p, p
    return n, p


def expect(condition: bool, measure: Measure, found: str) -> None:
    # not `assert`: pytest explains asserts in tests alone, and this one names the measure
    if not condition:
        raise AssertionError(f"{measure.name}: {found}")


def near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Within `bound` of it, relative where it is above 1. NaN is near nothing."""
    return bool((found.double() - expected.double()).abs() < bound * expected.double().abs().clamp_min(1))


def correlated(measure: Measure, size: Size = (96, 40), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sides with some of their structure in common, of different widths where the measure takes them."""
    n, p = fitting(measure, size)
    q = p if measure.same_width else -(-p // 2)
    x_NP = features((n, p), seed)
    return x_NP, x_NP[:, :q] / 2 + features((n, q), seed + 1)


# what a measure says of itself


def check_it_describes_itself(measure: Measure) -> None:
    expect(bool(measure.name) and measure.name == measure.name.lower(), measure, "expected a name in lower case")
    expect(bool(measure.summary) and "\n" not in measure.summary, measure, "expected a summary of one line")
    expect(measure.min_examples >= 1, measure, f"min_examples is {measure.min_examples}")
    expect(measure.differentiable or not measure.additive, measure, "a mean over examples has a gradient")


def check_options_have_defaults(measure: Measure) -> None:
    for call in (measure.value, *([measure.loss] if measure.differentiable else [])):
        for option in list(inspect.signature(call).parameters.values())[2:]:
            expect(option.default is not option.empty, measure, f"option {option.name!r} has no default")


# values


def check_nothing_is_more_similar_than_itself(measure: Measure, size: Size = (20, 6), seed: int = 0) -> None:
    size = fitting(measure, size)
    x_NP, y_NP = features(size, seed), features(size, seed + 1)
    best, other = measure.value(x_NP, x_NP).item(), measure.value(x_NP, y_NP).item()
    end = 1.0 if measure.higher_is_better else 0.0
    expect(abs(best - end) < 1e-9, measure, f"of features and themselves {best}, expected {end}")
    # a handful of rows can have the same neighbours by chance, and nothing more than the same
    no_better = other <= best if measure.higher_is_better else other >= best
    expect(no_better, measure, f"of unrelated features {other}, of features and themselves {best}")


def check_unrelated_features_are_less_similar(measure: Measure) -> None:
    size = fitting(measure, (20, 6))
    x_NP, y_NP = features(size, 0), features(size, 1)
    best, other = measure.value(x_NP, x_NP).item(), measure.value(x_NP, y_NP).item()
    expect(abs(other - best) > 1e-3, measure, f"of unrelated features {other}, of features and themselves {best}")


def check_a_loss_is_zero_at_identity_and_above_it_elsewhere(
    measure: Measure, size: Size = (20, 6), seed: int = 0
) -> None:
    size = fitting(measure, size)
    x_NP, y_NP = features(size, seed), features(size, seed + 1)
    if not measure.differentiable:
        try:
            measure.loss(x_NP, y_NP)
        except EvaluationOnlyError:
            return
        expect(False, measure, "expected EvaluationOnlyError from the loss of a measure without one")
    same, apart = measure.loss(x_NP, x_NP).item(), measure.loss(x_NP, y_NP).item()
    expect(0 <= same < 1e-12, measure, f"the loss of features and themselves is {same}")
    expect(apart > 1e-3, measure, f"the loss of unrelated features is {apart}")


def changed(kind: str, x_NP: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    if kind == "rotation":
        return x_NP @ torch.linalg.qr(features((x_NP.shape[1], x_NP.shape[1]), seed)).Q
    return x_NP * scale if kind == "scale" else x_NP + 10 * features((1, x_NP.shape[1]), seed)


def differences(
    measure: Measure, kind: str, size: Size = (20, 6), seed: int = 0, scale: float = 3.0
) -> Iterator[tuple[str, float]]:
    """How far the value moves when one side is changed, side by side."""
    size = fitting(measure, size)
    x_NP, y_NP = features(size, seed), features(size, seed + 1)
    before = measure.value(x_NP, y_NP).item()
    yield "x", abs(measure.value(changed(kind, x_NP, seed + 2, scale), y_NP).item() - before)
    yield "y", abs(measure.value(x_NP, changed(kind, y_NP, seed + 2, scale)).item() - before)


def check_it_is_blind_to_what_it_says(
    measure: Measure, size: Size = (20, 6), seed: int = 0, scale: float = 3.0
) -> None:
    for kind in sorted(measure.blind_to):
        for side, difference in differences(measure, kind, size, seed, scale):
            expect(difference < 1e-8, measure, f"blind to {kind}, but that of {side} moves the value by {difference}")


def check_it_sees_what_it_does_not_say_it_is_blind_to(measure: Measure) -> None:
    for kind in sorted(set(CHANGES) - measure.blind_to):
        # one side is enough: PWCCA sees a rotation of x, whose features it weighs, and none of y
        seen = max(difference for _, difference in differences(measure, kind))
        expect(seen > 1e-3, measure, f"{kind} moves the value by {seen}: it belongs in blind_to")


def check_a_prepared_guide_changes_nothing(measure: Measure) -> None:
    x_NP, y_NQ = correlated(measure, (16, 5))
    if not measure.differentiable:
        return  # nothing trains on it, so nothing prepares for it
    guide = measure.prepare(y_NQ)
    expect(near(measure.value(x_NP, guide), measure.value(x_NP, y_NQ), 1e-12), measure, "a prepared y changes value")
    expect(near(measure.loss(x_NP, guide), measure.loss(x_NP, y_NQ), 1e-12), measure, "a prepared y changes loss")


# gradients


def check_value_and_loss_have_the_numerical_gradient(measure: Measure) -> None:
    size = fitting(measure, (7, 3))
    x_NP, y_NP = features(size, 0).requires_grad_(), features(size, 1).requires_grad_()
    if not measure.differentiable:
        expect(not measure.value(x_NP, y_NP).requires_grad, measure, "a gradient of a measure without a loss")
        return
    for call in (measure.value, measure.loss):
        try:
            torch.autograd.gradcheck(call, (x_NP, y_NP))
        except RuntimeError as error:
            raise AssertionError(f"{measure.name}: not the numerical gradient: {error}") from error


def check_a_step_down_the_loss_makes_the_value_better(measure: Measure) -> None:
    if not measure.differentiable:
        return
    size = fitting(measure, (16, 5))
    x_NP, y_NP = features(size, 0).requires_grad_(), features(size, 1)
    before = measure.value(x_NP, y_NP).item()
    (grad_NP,) = torch.autograd.grad(measure.loss(x_NP, y_NP), x_NP)
    after = measure.value(x_NP - 1e-3 * grad_NP / grad_NP.norm(), y_NP).item()
    better = after > before if measure.higher_is_better else after < before
    expect(better, measure, f"a step down the loss moves the value from {before} to {after}")


# precision


def check_float32_is_within_a_hundred_thousandth_of_float64(measure: Measure) -> None:
    for offset in OFFSETS:
        x_NP, y_NQ = ((z + offset).float() for z in correlated(measure))
        check_value(measure, x_NP, y_NQ, torch.float32)
        if measure.differentiable:
            check_gradients(measure, x_NP, y_NQ)


def check_a_loss_near_its_end_still_has_digits_and_a_direction(measure: Measure) -> None:
    if not measure.differentiable:
        return
    size = fitting(measure, (64, 24))
    y_NP = features(size, 0, torch.float32)
    x_NP = (y_NP + 1e-4 * features(size, 1, torch.float32)).requires_grad_()
    exact_NP = x_NP.detach().double().requires_grad_()
    loss, expected = measure.loss(x_NP, y_NP), measure.loss(exact_NP, y_NP.double())
    found = f"near identity the loss is {loss.item()}, in float64 {expected.item()}"
    expect(0 < expected.item() < 1e-6 and relative_error(loss, expected) < 2e-2, measure, found)
    loss.backward()
    expected.backward()
    error = relative_error(x_NP.grad, exact_NP.grad)
    expect(error < 2e-2, measure, f"near identity the gradient is off by {error}")


def check_half_precision_keeps_the_digits_of_float32(measure: Measure) -> None:
    for dtype in HALF:
        # squares of the second overflow float16; the third, wider than long, leaves bfloat16 three bits of the features
        for size, scale, offset in (((96, 40), 1.0, 0.0), ((96, 40), 300.0, 0.0), ((32, 96), 1.0, 30.0)):
            x_NP, y_NQ = ((scale * z + offset).to(dtype) for z in correlated(measure, size))
            check_value(measure, x_NP, y_NQ, torch.float32)
            if measure.differentiable:
                check_gradients(measure, x_NP, y_NQ)


def check_sides_of_two_dtypes_meet_in_the_wider(measure: Measure) -> None:
    x_NP, y_NQ = correlated(measure)
    for own, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16), (*HALF,)):
        check_value(measure, x_NP.to(own), y_NQ.to(other), torch.float32)
        if measure.differentiable:
            check_gradients(measure, x_NP.to(own), y_NQ.to(other))
    for own, other in ((torch.bfloat16, torch.float64), (torch.float64, torch.float32)):
        check_value(measure, x_NP.to(own), y_NQ.to(other), torch.float64)


def check_value(measure: Measure, x_NP: torch.Tensor, y_NQ: torch.Tensor, dtype: torch.dtype) -> None:
    """Value and loss against those of the same, already rounded features in float64."""
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    for what, call in (("value", measure.value), ("loss", measure.loss))[: 1 + measure.differentiable]:
        found, expected = call(x_NP, y_NQ), call(x_NP.double(), y_NQ.double())
        where = f"{what} of {x_NP.dtype} and {y_NQ.dtype}"
        expect(found.dtype == dtype, measure, f"{where} is {found.dtype}, expected {dtype}")
        expect(near(found, expected, bound), measure, f"{where} is {found.item()}, in float64 {expected.item()}")


def check_gradients(measure: Measure, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None:
    """The loss's gradients, in the features' own dtypes."""
    sides = [z.detach().requires_grad_() for z in (x_NP, y_NQ)]
    exact = [z.detach().double().requires_grad_() for z in (x_NP, y_NQ)]
    expected = torch.autograd.grad(measure.loss(*exact), exact)
    # as one trains in float16: a loss scaled so that its gradients aren't lost below the smallest number
    scale = 1 / max(grad.abs().max().item() for grad in expected)
    found = torch.autograd.grad(measure.loss(*sides) * scale, sides)
    for name, side, grad, exact_grad in zip("xy", sides, found, expected, strict=True):
        expect(grad.dtype == side.dtype, measure, f"the gradient of {name}, {side.dtype}, is {grad.dtype}")
        error = relative_error(grad, exact_grad * scale)
        expect(error < GRADIENT[side.dtype], measure, f"the gradient of {name}, {side.dtype}, is off by {error}")


def check_autocast_does_not_lower_the_precision(measure: Measure) -> None:
    x_NP, y_NQ = (z.float() for z in correlated(measure))
    expected = measure.value(x_NP, y_NQ)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expect(torch.equal(measure.value(x_NP, y_NQ), expected), measure, "autocast changes the value")


# refusals


def check_nan_and_infinity_are_found_and_located(measure: Measure) -> None:
    size = fitting(measure, (8, 5))
    calls = [measure.value, measure.loss][: 1 + measure.differentiable]
    for dtype in (torch.float32, *HALF):
        for name in ("x", "y"):
            for bad in (float("nan"), float("inf")):
                sides = {"x": features(size, 0, dtype), "y": features(size, 1, dtype)}
                sides[name][6, 2] = bad
                for call in calls:
                    expect_error(
                        measure,
                        NumericalError,
                        f"{measure.name}: {name} holds 1 values that are NaN or infinite, the first at example 6, "
                        "feature 2",
                        partial(call, sides["x"], sides["y"]),
                    )


def check_what_overflows_is_an_error_and_never_an_infinity(measure: Measure) -> None:
    size = fitting(measure, (8, 5))
    for dtype, largest in ((torch.float32, 3e37), (torch.bfloat16, 3e37), (torch.float16, 1e4)):
        x_NP, y_NP = (largest * features(size, seed, dtype).clamp(-3, 3) for seed in (0, 1))
        try:
            value = measure.value(x_NP, y_NP)
        except NumericalError:
            continue
        expect(bool(value.isfinite()), measure, f"of {dtype} of {largest} the value is {value.item()}")


def check_constant_features_are_refused(measure: Measure) -> None:
    size = fitting(measure, (8, 5))
    for name in measure.must_vary:
        sides = {"x": features(size, 0), "y": features(size, 1)}
        sides[name] = torch.full(size, 300.1)
        message = f"{measure.name}: {name} is constant, the same for all {size[0]} examples"
        expect_error(measure, DataError, message, partial(measure.value, sides["x"], sides["y"]))


def check_shapes_that_do_not_fit_are_refused(measure: Measure) -> None:
    n, p = fitting(measure, (8, 5))
    x_NP = features((n, p), 0)
    message = f"{measure.name}: expected as many examples in x as in y, found {n} and {n + 1}"
    expect_error(measure, DataError, message, lambda: measure.value(x_NP, features((n + 1, p), 1)))
    if measure.same_width:
        message = f"{measure.name}: expected x and y of the same width, found {p} and {p + 1}. Use measure='cka'"
        expect_error(measure, DataError, message, lambda: measure.value(x_NP, features((n, p + 1), 1)))
    else:
        expect(bool(measure.value(x_NP, features((n, p - 1), 1)).isfinite()), measure, "no value for two widths")
    few = measure.min_examples - 1
    message = f"{measure.name}: expected at least {few + 1} examples, found {few} in x"
    expect_error(measure, DataError, message, lambda: measure.value(x_NP[:few], x_NP[:few]))


def expect_error(measure: Measure, kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        expect(message in str(error), measure, f"expected {message!r}, found {str(error)!r}")
        return
    expect(False, measure, f"nothing was raised, expected {kind.__name__}: {message}")


def check_masked_rows_are_as_if_they_were_not_there_even_when_nan(measure: Measure) -> None:
    n, p = fitting(measure, (24, 5))
    x_NP, y_NP = features((2 * n, p), 0), features((2 * n, p), 1)
    keep_N = torch.arange(2 * n) % 4 != 0
    expected = similarity(x_NP[keep_N], y_NP[keep_N], measure)
    x_NP[~keep_N] = torch.nan
    x_NP.requires_grad_(measure.differentiable)
    value = similarity(x_NP, y_NP, measure, mask=keep_N)
    expect(torch.equal(value.detach(), expected), measure, f"masked {value.item()}, without those rows {expected}")
    if measure.differentiable:
        (grad_NP,) = torch.autograd.grad(value, x_NP)
        expect(bool((grad_NP[~keep_N] == 0).all()), measure, "masked rows have a gradient")
        expect(bool(grad_NP[keep_N].isfinite().all() and grad_NP[keep_N].any()), measure, "kept rows have none")


CHECKS: tuple[Callable[[Measure], None], ...] = (
    check_it_describes_itself,
    check_options_have_defaults,
    check_nothing_is_more_similar_than_itself,
    check_unrelated_features_are_less_similar,
    check_a_loss_is_zero_at_identity_and_above_it_elsewhere,
    check_it_is_blind_to_what_it_says,
    check_it_sees_what_it_does_not_say_it_is_blind_to,
    check_a_prepared_guide_changes_nothing,
    check_value_and_loss_have_the_numerical_gradient,
    check_a_step_down_the_loss_makes_the_value_better,
    check_float32_is_within_a_hundred_thousandth_of_float64,
    check_a_loss_near_its_end_still_has_digits_and_a_direction,
    check_half_precision_keeps_the_digits_of_float32,
    check_sides_of_two_dtypes_meet_in_the_wider,
    check_autocast_does_not_lower_the_precision,
    check_nan_and_infinity_are_found_and_located,
    check_what_overflows_is_an_error_and_never_an_infinity,
    check_constant_features_are_refused,
    check_shapes_that_do_not_fit_are_refused,
    check_masked_rows_are_as_if_they_were_not_there_even_when_nan,
)


def check_measure(measure: Measure) -> None:
    """Every check in turn. Raises AssertionError at the first that does not hold."""
    for check in CHECKS:
        check(measure)
