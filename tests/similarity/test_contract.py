"""The contract itself: a measure of one's own passes it, and each lie is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.similarity import contract
from tests.similarity.contract import CHECKS, check_measure
from thesean.similarity import Measure


def overlap(x_NP: torch.Tensor, y_NP: torch.Tensor) -> torch.Tensor:
    """<x, y> / (|x| |y|), of all examples as one vector."""
    return 1 - apart(x_NP, y_NP)


def apart(x_NP: torch.Tensor, y_NP: torch.Tensor) -> torch.Tensor:
    return (unit(x_NP) - unit(y_NP)).square().sum() / 2


def unit(x_NP: torch.Tensor) -> torch.Tensor:
    wide_NP = x_NP.double()
    return (wide_NP / wide_NP.square().sum().sqrt()).to(x_NP.dtype)


def measure(**changes: Any) -> Measure:
    about: dict[str, Any] = dict(
        name="overlap", summary="the angle between all activations", value=overlap, loss=apart, same_width=True
    )
    return Measure(**about | dict(blind_to=frozenset({"scale"})) | changes)


def test_a_measure_of_ones_own_passes():
    check_measure(measure())
    check_measure(measure(loss=None))


def test_every_check_of_the_module_is_run():
    written = [f for name, f in vars(contract).items() if name.startswith("check_")]
    helpers = {contract.check_measure, contract.check_value, contract.check_gradients}
    assert set(written) - helpers == set(CHECKS)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (dict(name="Overlap"), "expected a name in lower case"),
        (dict(summary=""), "expected a summary"),
        (dict(min_examples=0), "min_examples is 0"),
        (dict(value=lambda x, y, power: overlap(x, y) ** power), "option 'power' has no default"),
        (dict(value=lambda x, y: 2 * overlap(x, y)), "of features and themselves 2.0, expected 1.0"),
        (dict(loss=lambda x, y: apart(x, y) + 1e-6), "the loss of features and themselves is"),
        (dict(loss=lambda x, y: -apart(x, y)), "the loss of unrelated features is"),
        (dict(blind_to=frozenset({"scale", "shift"})), "blind to shift, but that of x moves the value"),
        (dict(blind_to=frozenset()), "scale moves the value by .*: it belongs in blind_to"),
        (dict(prepare=lambda y: y.detach() + 1), "a prepared y changes value"),
        (dict(value=lambda x, y: overlap(x.detach(), y) + 0 * x.sum()), "not the numerical gradient"),
        (dict(takes_half=True), "in float64"),
        (dict(value=lambda x, y: overlap(x.nan_to_num(), y)), "nothing was raised, expected NumericalError"),
        (dict(same_width=False), "The size of tensor a"),
    ],
)
def test_a_measure_that_does_not_hold_what_it_says_is_found(changes, found):
    # what a formula itself raises needs no other name
    with pytest.raises((AssertionError, RuntimeError), match=found):
        check_measure(measure(**changes))
