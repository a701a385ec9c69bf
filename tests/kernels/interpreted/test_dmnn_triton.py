"""The Triton kernels of D-MNN against the float64 reference. N examples, P width of x, Q width of y"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import KERNEL_GRADIENT, KERNEL_VALUE, relative_error
from thesean.kernels.dmnn import cosines, dmnn, dmnn_distance


def features(n: int, p: int, q: int, dtype: torch.dtype, offset: float) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    shared_NK = torch.randn(n, 8, generator=g)
    return [
        (shared_NK @ torch.randn(8, w, generator=g) + torch.randn(n, w, generator=g) + offset)
        .to(dtype)
        .requires_grad_()
        for w in (p, q)
    ]


@pytest.mark.parametrize(
    ("n", "dtype", "offset", "temperature"),
    [
        (5, torch.float32, 0.0, 0.1),
        (64, torch.float32, 50.0, 1.0),
        (150, torch.float32, 50.0, 0.1),
        (150, torch.float16, 50.0, 0.1),
        (150, torch.bfloat16, 50.0, 0.1),
    ],
)
def test_values_and_gradients_are_those_of_the_reference_in_float64(n, dtype, offset, temperature):
    x_NP, y_NQ = features(n, 77, 30, dtype, offset)
    exact = [x.detach().double().requires_grad_() for x in (x_NP, y_NQ)]
    for measure in (dmnn, dmnn_distance):
        value = measure(x_NP, y_NQ, temperature=temperature, backend="triton")
        expected = measure(*exact, temperature=temperature, backend="torch")
        assert value.dtype == torch.float32
        assert abs(value.item() - expected.item()) < KERNEL_VALUE[torch.float32]
        grads, expected_grads = torch.autograd.grad(value, [x_NP, y_NQ]), torch.autograd.grad(expected, exact)
        for grad, exact_grad in zip(grads, expected_grads, strict=True):
            assert grad.dtype == dtype
            assert relative_error(grad, exact_grad) < KERNEL_GRADIENT[dtype]


def test_a_prepared_guide_gives_the_same_value_and_gradient():
    x_NP, y_NQ = features(70, 20, 30, torch.float32, 50.0)
    for measure in (dmnn, dmnn_distance):
        direct = measure(x_NP, y_NQ, backend="triton")
        cached = measure(x_NP, cosines(y_NQ), prepared=True, backend="triton")
        assert abs(direct.item() - cached.item()) < KERNEL_VALUE[torch.float32]
        grads = [torch.autograd.grad(value, x_NP)[0] for value in (direct, cached)]
        assert relative_error(grads[0], grads[1]) < KERNEL_GRADIENT[torch.float32]


def test_more_columns_than_a_block_holds_are_read_in_turn(monkeypatch):
    from thesean.kernels import dmnn_triton
    from thesean.kernels.shared.launches import Launch

    x_NP, y_NQ = features(90, 12, 9, torch.float32, 0.0)
    whole = dmnn(x_NP, y_NQ, backend="triton")
    small = Launch(block=16, depth=32, warps=1)
    given = dmnn_triton.launch
    monkeypatch.setattr(dmnn_triton, "launch", lambda op, *rest: small if op == "dmnn" else given(op, *rest))
    blocked = dmnn(x_NP, y_NQ, backend="triton")
    assert abs(whole.item() - blocked.item()) < KERNEL_VALUE[torch.float32]
    grads = [torch.autograd.grad(value, [x_NP, y_NQ]) for value in (whole, blocked)]
    for one, other in zip(*grads, strict=True):
        assert relative_error(one, other) < KERNEL_GRADIENT[torch.float32]


def test_two_runs_agree_to_the_bit():
    x_NP, y_NQ = features(70, 20, 30, torch.float32, 0.0)
    runs = []
    for _ in range(2):
        value = dmnn(x_NP, y_NQ, backend="triton")
        runs.append([value, *torch.autograd.grad(value, [x_NP, y_NQ])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_float64_is_refused_by_name():
    x_NP, y_NQ = features(20, 8, 8, torch.float64, 0.0)
    with pytest.raises(ValueError, match="dmnn: expected float32 for the Triton kernel, found float64"):
        dmnn(x_NP, y_NQ, backend="triton")
