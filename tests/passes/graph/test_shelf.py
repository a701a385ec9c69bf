from __future__ import annotations

import os

import pytest
import torch

from thesean.passes.graph.shelf import Shelf


def test_what_fits_stays_as_it_is_and_the_rest_is_equal():
    first, second = torch.randn(4, 8), torch.randn(2, 3)
    with Shelf(bound=first.numel() * 4) as shelf:
        kept = shelf.keep({"a": first, "b": (second, 3)})
        assert kept["a"] is first
        assert kept["b"][0] is not second
        assert torch.equal(kept["b"][0], second)
        assert kept["b"][1] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_every_dtype_and_layout_comes_back(dtype):
    tensor = (torch.randn(3, 5, 2) * 4).to(dtype).transpose(0, 2)
    with Shelf(bound=0) as shelf:
        for value in (tensor, tensor[0, 0, 0], tensor[:0]):
            mapped = shelf.map(value)
            assert mapped.dtype == dtype
            assert torch.equal(mapped, value)


def test_what_is_cleared_makes_room():
    tensor = torch.randn(8)
    with Shelf(bound=32) as shelf:
        assert shelf.keep(tensor) is tensor
        assert shelf.keep(tensor) is not tensor
        shelf.clear()
        assert shelf.keep(tensor) is tensor


def test_a_disk_without_room_leaves_the_tensor_in_memory(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(8)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with Shelf(bound=0) as shelf:
        monkeypatch.setattr(torch, "from_file", full)
        assert shelf.keep(tensor) is tensor


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Shelf(bound=0) as shelf:
        shelf.keep([torch.randn(8), torch.randn(8)])
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []
