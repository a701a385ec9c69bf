"""What products of a file are given on data, by file and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.deploy.quantizing.test_products import named
from thesean.deploy.quantizing import grams as grams_file
from thesean.deploy.quantizing.grams import grams

TEXT = """g (float[batch, time, 6] x, float[batch, 1, 6] start, float[6, 6] W, float[6, 4] V, float[6, 4] U)
    => (float[batch, time, 4] v, float[batch, time, 4] u, float[batch, time, 6] started)
{
    once = MatMul (x, W)
    v = MatMul (once, V)
    u = MatMul (once, U)
    started = Add (x, start)
}"""


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, ir.Model]:
    model = named(TEXT)
    ir.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx", model


@pytest.mark.parametrize("at_once", [2**29, 1])
def test_products_of_the_same_are_told_their_sum_of_squares(source, at_once, monkeypatch):
    monkeypatch.setattr(grams_file, "_MOST", at_once)
    path, model = source
    draw = np.random.default_rng(0)
    feeds = [
        {"x": draw.normal(size=(2, t, 6)).astype(np.float32), "start": np.zeros((2, 1, 6), np.float32)} for t in (3, 5)
    ]
    nodes = [node for node in model.graph if node.op_type == "MatMul"]
    found = {tuple(n.name for n in alike): gram for alike, gram in grams(path, nodes, feeds)}
    assert list(found) == [("once",), ("v", "u")]
    x_SK = np.concatenate([f["x"].reshape(-1, 6) for f in feeds])
    once_SK = x_SK @ model.graph.initializers["W"].const_value.numpy()
    for gram, rows in zip(found.values(), (x_SK, once_SK), strict=True):
        torch.testing.assert_close(gram, torch.from_numpy(rows.T @ rows), rtol=1e-4, atol=1e-4)
    assert [v.name for v in model.graph.outputs] == ["v", "u", "started"]  # the graph itself stays as it is
