"""Every measure in float32 against itself in float64, at offsets that cost uncentred code all its digits."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import GRADIENT, relative_error
from thesean.similarity import get_measure, measures, similarity

TRAINABLE = [name for name in measures() if get_measure(name).differentiable]
OPTIONS: list[tuple[str, dict[str, str]]] = [(name, {}) for name in measures()] + [
    ("rsa", {"distance": "correlation"}),
    ("rsa", {"rank": "spearman"}),
]


def sides(name: str, offset: float, n: int = 96, p: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x_NP = torch.randn(n, p, generator=g)
    q = p if get_measure(name).same_width else 24
    return x_NP + offset, x_NP[:, :q] * 0.5 + torch.randn(n, q, generator=g) + offset


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_float32_is_within_a_hundred_thousandth_of_float64(name, options, offset):
    x_NP, y_NP = sides(name, offset)
    value = similarity(x_NP, y_NP, name, **options)
    expected = similarity(x_NP.double(), y_NP.double(), name, **options)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.item()) < 1e-5 * max(1.0, abs(expected.item()))


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_the_gradient_keeps_four_digits_at_any_offset(name, offset):
    x_NP, y_NP = sides(name, offset)
    x_NP, exact_NP = x_NP.requires_grad_(), x_NP.detach().double().requires_grad_()
    get_measure(name).loss(x_NP, y_NP).backward()
    get_measure(name).loss(exact_NP, y_NP.double()).backward()
    assert relative_error(x_NP.grad, exact_NP.grad) < GRADIENT[torch.float32]


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_loss_near_its_end_still_has_digits_and_a_direction(name):
    g = torch.Generator().manual_seed(0)
    y_NP = torch.randn(64, 24, generator=g)
    x_NP = (y_NP + 1e-4 * torch.randn(64, 24, generator=g)).requires_grad_()
    exact_NP = x_NP.detach().double().requires_grad_()
    loss, expected = get_measure(name).loss(x_NP, y_NP), get_measure(name).loss(exact_NP, y_NP.double())
    loss.backward()
    expected.backward()
    assert 0 < expected.item() < 1e-6
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert relative_error(x_NP.grad, exact_NP.grad) < 2e-2


@pytest.mark.parametrize("name", measures())
def test_autocast_does_not_lower_the_precision(name):
    x_NP, y_NP = sides(name, 0.0)
    expected = similarity(x_NP, y_NP, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity(x_NP, y_NP, name), expected)
