from __future__ import annotations

import math

import pytest
import torch

from thesean.targets.shared.activations import ACTIVATIONS

E = math.e


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("identity", -2.0, -2.0),
        ("gelu", 1.0, 0.5 * (1 + math.erf(0.5**0.5))),
        ("gelu_tanh", 1.0, 0.5 * (1 + math.tanh((2 / math.pi) ** 0.5 * 1.044715))),
        ("quick_gelu", 1.0, 1 / (1 + math.exp(-1.702))),
        ("relu", -2.0, 0.0),
        ("relu6", 7.0, 6.0),
        ("squared_relu", 3.0, 9.0),
        ("squared_relu", -3.0, 0.0),
        ("leaky_relu", -2.0, -0.02),
        ("elu", -1.0, 1 / E - 1),
        ("selu", 1.0, 1.0507009873554805),
        ("silu", 1.0, 1 / (1 + 1 / E)),
        ("mish", 1.0, math.tanh(math.log(1 + E))),
        ("softplus", 0.0, math.log(2)),
        ("hardswish", 1.0, 2 / 3),
        ("hardsigmoid", 1.0, 2 / 3),
        ("sigmoid", 0.0, 0.5),
        ("tanh", 1.0, math.tanh(1)),
    ],
)
def test_each_is_its_formula(name, x, expected):
    assert ACTIVATIONS[name](torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_no_two_are_one_function():
    x = torch.linspace(-12, 12, 1000, dtype=torch.float64)
    values = {name: act(x) for name, act in ACTIVATIONS.items()}
    names = list(values)
    gaps = {
        (a, b): float(((values[a] - values[b]).abs() / (1 + values[a].abs())).max())
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    assert min(gaps.values()) > 1e-4, min(gaps, key=gaps.__getitem__)
