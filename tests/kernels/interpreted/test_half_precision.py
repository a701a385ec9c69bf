"""Which tiles of the launch table a user's half precision gets, and what that costs the measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests.tolerances import KERNEL_GRADIENT, relative_error
from thesean.kernels import centred_gram
from thesean.kernels.shared import grams_triton, launches
from thesean.similarity import get_measure, similarity

HALF = [torch.bfloat16, torch.float16]


def sides(dtype: torch.dtype, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shared_NK = torch.randn(70, 8, generator=g)
    x, y = (shared_NK @ torch.randn(8, w, generator=g) + torch.randn(70, w, generator=g) + offset for w in (60, 90))
    return x.to(dtype), y.to(dtype)


@pytest.fixture
def tiles(monkeypatch) -> list[tuple[str, launches.Launch]]:
    taken: list[tuple[str, launches.Launch]] = []

    def launch(op: str, device: torch.device, dtype: torch.dtype) -> launches.Launch:
        entry = launches.launch(op, device, dtype)
        if op == "cka":
            taken.append((str(dtype), entry))
        return entry

    monkeypatch.setattr(grams_triton, "launch", launch)
    return taken


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["cka", "cka-debiased"])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_similarity_and_loss_take_the_tiles_of_half_precision_and_keep_their_digits(tiles, name, dtype, offset):
    x_NP, y_NQ = sides(dtype, offset)
    x_NP.requires_grad_()
    value = thesean.similarity(x_NP, y_NQ, name, backend="triton")
    loss = get_measure(name).loss(x_NP, y_NQ, backend="triton")
    half = launches.TABLE["cka", "sm80", dtype]
    assert half != launches.TABLE["cka", "sm80", torch.float32]
    assert tiles == [(str(dtype), half)] * 2
    exact_NP = x_NP.detach().double().requires_grad_()
    expected = similarity(exact_NP, y_NQ.double(), name)
    assert abs(value.item() - expected.item()) < 1e-4
    assert abs(loss.item() - (1 - expected.item())) < 1e-4
    (grad_NP,), (exact_grad_NP,) = torch.autograd.grad(loss, x_NP), torch.autograd.grad(1 - expected, exact_NP)
    assert grad_NP.dtype == dtype
    assert relative_error(grad_NP, exact_grad_NP) < KERNEL_GRADIENT[dtype]


@pytest.mark.parametrize("dtype", HALF)
def test_dmnn_widens_inside_the_kernel_where_its_temperature_asks_for_it(tiles, dtype):
    x_NP, y_NQ = sides(dtype)
    value = similarity(x_NP, y_NQ, "dmnn", backend="triton")
    assert tiles == [(str(torch.float32), launches.TABLE["cka", "sm80", torch.float32])]
    assert abs(value.item() - similarity(x_NP.double(), y_NQ.double(), "dmnn").item()) < 1e-6


@pytest.mark.parametrize("own", HALF)
def test_two_dtypes_take_the_tiles_of_float32(tiles, own):
    x_NP, y_NQ = sides(torch.float32)
    value = similarity(x_NP.to(own), y_NQ, backend="triton")
    assert tiles == [(str(torch.float32), launches.TABLE["cka", "sm80", torch.float32])]
    assert abs(value.item() - similarity(x_NP.to(own).double(), y_NQ.double()).item()) < 1e-6


@pytest.mark.parametrize("dtype", HALF)
def test_compare_takes_the_tiles_of_half_precision(tiles, dtype, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 24), nn.Linear(24, 16)).to(dtype)
    x_NP, _ = sides(dtype)
    expected = thesean.compare(model, model, [x_NP]).matrix
    assert tiles == []
    monkeypatch.setattr(centred_gram, "choose", lambda *_: "triton")  # as on a GPU
    found = thesean.compare(model, model, [x_NP]).matrix
    assert tiles == [(str(dtype), launches.TABLE["cka", "sm80", dtype])] * 2
    assert (found - expected).abs().max() < 1e-4
