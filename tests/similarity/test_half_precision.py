"""Half precision reaches the kernels as it is, from everywhere: what they widen is their own business."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests.tolerances import GRADIENT, relative_error
from thesean.kernels import centred_gram, cka, dmnn
from thesean.similarity import accumulate, get_measure, similarity

HALF = [torch.bfloat16, torch.float16]
KERNELS = {"cka": cka, "cka-debiased": cka, "dmnn": dmnn}


def features(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def received(monkeypatch) -> list[tuple[str, list[torch.dtype]]]:
    """What the Triton kernels would be called with: their variant, and the dtypes of the tensors."""
    calls: list[tuple[str, list[torch.dtype]]] = []

    def load(op: str, variant: str | None = None) -> Any:
        def kernel(*sides: Any, **options: Any) -> torch.Tensor:
            calls.append((variant or op, [side.dtype for side in sides]))
            if op == "centred_gram":
                return centred_gram.centred_gram(*sides, backend="torch")
            return getattr(KERNELS[op], variant or op)(*sides, **options, backend="torch")

        return kernel

    for module in (cka, dmnn, centred_gram):
        real = module.choose
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(
            module, "choose", lambda backend, *rest, real=real: "triton" if backend == "auto" else real(backend, *rest)
        )
    return calls


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", list(KERNELS))
def test_similarity_and_losses_hand_it_on(received, name, dtype):
    op = name.removesuffix("-debiased")
    x_NP, y_NP = features(dtype).requires_grad_(), features(dtype, 1)
    thesean.similarity(x_NP.view(24, 5, 8), y_NP.view(24, 8, 5), name)
    (grad_NP,) = torch.autograd.grad(get_measure(name).loss(x_NP, y_NP), x_NP)
    assert received == [(op, [dtype] * 2), (f"{op}_distance", [dtype] * 2)]
    assert grad_NP.dtype == dtype
    exact_NP = x_NP.detach().double().requires_grad_()
    (exact_grad_NP,) = torch.autograd.grad(get_measure(name).loss(exact_NP, y_NP.double()), exact_NP)
    assert relative_error(grad_NP, exact_grad_NP) < GRADIENT[dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", list(KERNELS))
def test_a_prepared_guide_leaves_the_student_as_it_is(received, name, dtype):
    measure = get_measure(name)
    guide = measure.prepare(features(dtype, 1))
    expected = similarity(features(torch.float64).to(dtype), features(dtype, 1), name)
    received.clear()
    assert measure.value(features(dtype), guide).item() == pytest.approx(expected.item(), abs=1e-6)
    ((op, dtypes),) = received
    assert op == name.removesuffix("-debiased")
    assert dtypes[0] == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_batches_and_layers_do_too(received, dtype):
    running = accumulate("cka-debiased")
    running.update(features(dtype), features(dtype, 1))
    assert received == [("cka", [dtype] * 2), ("centred_gram", [dtype]), ("centred_gram", [dtype])]
    received.clear()
    model = nn.Sequential(nn.Linear(40, 12), nn.Linear(12, 8)).to(dtype)
    thesean.compare(model, model, [features(dtype)])
    assert received == [("centred_gram", [dtype])] * 2
    received.clear()
    thesean.compare(model, model, [features(dtype)], "dmnn")
    assert received == [("dmnn", [dtype] * 2)] * 4


def test_double_precision_never_meets_a_kernel_that_has_none(received):
    for other in (*HALF, torch.float32):
        similarity(features(torch.float64), features(other, 1), "cka")
        similarity(features(other), features(torch.float64, 1), "dmnn")
    assert received == []


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_side_of_float32_is_not_rounded_for_the_other_of_half(name):
    x_NP, y_NP = features(torch.bfloat16), features(torch.float32, 1)
    expected = similarity(x_NP.double(), y_NP.double(), name).item()
    assert similarity(x_NP, y_NP, name).item() == pytest.approx(expected, abs=1e-6)
    rounded = similarity(x_NP.double(), y_NP.bfloat16().double(), name).item()
    assert abs(rounded - expected) > 1e-5
