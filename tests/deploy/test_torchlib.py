"""torch's table of operators is read once, and stays torch's own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from thesean.deploy import torchlib
from thesean.deploy.lowering.to_onnx import DEFAULT_OPSET
from thesean.deploy.torchlib import table_kept

SIN = torch.ops.aten.sin.default


def make(opset: int = DEFAULT_OPSET) -> Any:
    return ONNXRegistry().from_torchlib(opset_version=opset)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The opsets of the tables that were read from torch's sources."""
    made: list[int] = []

    @cache
    def table(*, opset_version: int) -> Any:
        made.append(opset_version)
        return ONNXRegistry()

    monkeypatch.setattr(torchlib, "_table", table)
    return made


def test_a_table_is_read_once_an_opset(reads: list[int]):
    for _ in range(2):
        with table_kept():
            for opset in (20, 20, 18):
                make(opset)
    assert reads == [20, 18]


def test_the_kept_table_is_the_one_that_torch_makes():
    expected = make()
    with table_kept():
        found = make()
    assert found.opset_version == expected.opset_version == DEFAULT_OPSET
    assert found.functions.keys() == expected.functions.keys()
    for name, forms in expected.functions.items():
        assert [f.onnx_function for f in found.functions[name]] == [f.onnx_function for f in forms]


def test_what_one_export_registers_no_other_sees():
    with table_kept():
        first = make()
        first.register_op(SIN, lambda x: x)
        assert len(first.get_decomps(SIN)) == len(make().get_decomps(SIN)) + 1


def test_torchs_own_method_is_back_afterwards_and_after_an_error():
    before = vars(ONNXRegistry)["from_torchlib"]

    def interrupted() -> None:
        with table_kept():
            assert vars(ONNXRegistry)["from_torchlib"] is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert vars(ONNXRegistry)["from_torchlib"] is before


def test_a_torch_that_keeps_it_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torchlib, "_registry", lambda: (None, None))
    before = vars(ONNXRegistry)["from_torchlib"]
    with table_kept():
        assert vars(ONNXRegistry)["from_torchlib"] is before
