"""The Triton kernels' launch tables, which need neither triton nor a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import KERNEL_GRADIENT, relative_error
from thesean.kernels.shared import launches
from thesean.kernels.shared.launches import DTYPES, HARDWARE, TABLE, architecture, launch, slices

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_every_operation_has_an_entry_for_every_architecture():
    for arch in HARDWARE:
        for dtype in DTYPES:
            assert ("linear_recurrence", arch, dtype) in TABLE
            assert ("cka", arch, dtype) in TABLE
        assert ("dmnn", arch, torch.float32) in TABLE
        assert ("gram_statistics", arch, torch.float32) in TABLE


def test_block_sizes_are_powers_of_two_as_triton_asks():
    for entry in TABLE.values():
        for size in (entry.block, entry.depth, entry.warps):
            assert size & (size - 1) == 0


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 3), "sm100"), ((12, 0), "sm80")],
)
def test_a_gpu_gets_the_entries_of_its_architecture_or_those_that_ask_for_least(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(GPU) == expected


def test_an_amd_gpu_gets_cdna_entries(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert architecture(GPU) == "gfx942"


def test_a_dtype_without_a_kernel_is_refused_with_those_that_have_one():
    with pytest.raises(ValueError, match="dmnn: expected float32 for the Triton kernel, found bfloat16"):
        launch("dmnn", CPU, torch.bfloat16)


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the ten bits of mantissa that a tensor core keeps."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def gram(x_NP: torch.Tensor, precision: str) -> torch.Tensor:
    """What a kernel with this precision computes, but for the accumulator's rounding: the interpreter ignores it."""
    high_NP = tf32(x_NP)
    high, low = high_NP.double(), tf32(x_NP - high_NP).double()
    product_NN = high @ high.T
    return product_NN + high @ low.T + low @ high.T if precision == "tf32x3" else product_NN


def gradient(k_NN: torch.Tensor, l_NN: torch.Tensor, x_NP: torch.Tensor) -> torch.Tensor:
    k_hat, l_hat = k_NN / k_NN.norm(), l_NN / l_NN.norm()
    return (l_hat - (k_hat * l_hat).sum() * k_hat) @ x_NP.double()


def test_float32_on_tensor_cores_takes_three_products_and_one_would_not_do():
    g = torch.Generator().manual_seed(0)
    shared_NK = torch.randn(150, 20, generator=g)
    x_NP, y_NQ = (shared_NK @ torch.randn(20, w, generator=g) + torch.randn(150, w, generator=g) for w in (130, 64))
    exact = gradient(x_NP.double() @ x_NP.double().T, y_NQ.double() @ y_NQ.double().T, x_NP)
    bound = KERNEL_GRADIENT[torch.float32]
    for arch, hardware in HARDWARE.items():
        precision = TABLE["cka", arch, torch.float32].precision
        if hardware.backend == "cuda":
            assert precision == "tf32x3"
            assert relative_error(gradient(gram(x_NP, precision), gram(y_NQ, precision), x_NP), exact) < bound
        else:
            assert precision == "ieee"
    assert relative_error(gradient(gram(x_NP, "tf32"), gram(y_NQ, "tf32"), x_NP), exact) > 10 * bound


def test_few_tiles_are_split_along_the_features_and_many_are_not(monkeypatch):
    monkeypatch.setattr(launches, "architecture", lambda device: "sm90")
    entry = TABLE["cka", "sm90", torch.float32]
    assert slices(GPU, 10, 4096, entry) == 14  # 132 processors, 10 tiles
    assert slices(GPU, 500, 4096, entry) == 1
    assert slices(GPU, 10, 64, entry) == 1  # nothing to split
