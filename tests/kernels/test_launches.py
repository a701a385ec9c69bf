"""The Triton kernels' launch tables, which need neither triton nor a GPU."""

from __future__ import annotations

import pytest
import torch

from thesean.kernels import launches
from thesean.kernels.launches import DTYPES, HARDWARE, TABLE, architecture, launch, slices

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


def test_few_tiles_are_split_along_the_features_and_many_are_not(monkeypatch):
    monkeypatch.setattr(launches, "architecture", lambda device: "sm90")
    entry = TABLE["cka", "sm90", torch.float32]
    assert slices(GPU, 10, 4096, entry) == 14  # 132 processors, 10 tiles
    assert slices(GPU, 500, 4096, entry) == 1
    assert slices(GPU, 10, 64, entry) == 1  # nothing to split
