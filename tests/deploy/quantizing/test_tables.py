"""Embeddings have 8 bits; one that is the head too is looked up where the head's products read it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.deploy.quantizing.test_products import named
from thesean.deploy.quantizing.products import products
from thesean.deploy.quantizing.tools import Quantize, quantize_file

TIED = """g (int64[batch, time] ids, int64[batch] more) => (float[batch, time, 40] y, float[batch, WIDTH] m, OUT other)
<float[40, WIDTH] E>
{
    x = Gather (E, ids)
    m = Gather <axis = 0> (E, more)
    other = READ
    turned = Transpose <perm = [1, 0]> (E)
    y = MatMul (x, turned)
}"""


def written(folder: Path, width: int = 64, read: str = "Neg (x)", out: str = "float[batch, time, WIDTH]") -> Path:
    text = TIED.replace("OUT", out).replace("READ", read).replace("WIDTH", str(width))
    text = text.replace(f"<float[40, {width}] E>\n", "").replace("more)", f"more, float[40, {width}] E)", 1)
    ir.save(named(text), folder / "exact.onnx")
    return folder / "exact.onnx"


FEEDS = {"ids": np.arange(40, dtype=np.int64)[None], "more": np.array([3, 39, 0], dtype=np.int64)}


def quantized(
    source: Path, form: Quantize = "int4", feeds: dict[str, np.ndarray] = FEEDS
) -> tuple[dict[str, int], list[np.ndarray], list[np.ndarray]]:
    """How many nodes of each kind, and what both files give."""
    made = source.with_name("made.onnx")
    quantize_file(source, made, form, [feeds] if form == "int8-static" else ())
    exact, rough = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feeds) for p in (source, made)
    )
    kinds = [n.op_type for n in onnx.load(made).graph.node]
    return {kind: kinds.count(kind) for kind in kinds}, exact, rough


@pytest.mark.parametrize("form", get_args(Quantize))
def test_all_that_look_up_rows_do_so_where_the_product_reads_them(form, tmp_path):
    kinds, exact, rough = quantized(written(tmp_path), form)
    assert kinds == {"Reshape": 1, "GatherBlockQuantized": 2, "MatMulNBits": 1, "Neg": 1}
    for a, b in zip(exact, rough, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(a).max())
    steps = {i.name: list(i.dims) for i in onnx.load(tmp_path / "made.onnx").graph.initializer}
    assert sorted(np.prod(dims) for dims in steps.values()) == [2, 80, 40 * 64]


@pytest.mark.parametrize(
    ("read", "out"),
    [("Neg (E)", "float[40, WIDTH]"), ("Gather <axis = 1> (E, more)", "float[40, batch]")],
    ids=["read by another", "columns are looked up"],
)
def test_a_table_that_is_read_otherwise_stays(tmp_path, read, out):
    kinds, exact, rough = quantized(written(tmp_path, 64, read, out))
    assert "GatherBlockQuantized" not in kinds
    assert kinds["MatMulNBits"] == 1
    np.testing.assert_array_equal(exact[1], rough[1])


def test_a_table_whose_rows_are_no_whole_blocks_has_levels_of_its_own(tmp_path):
    kinds, exact, rough = quantized(written(tmp_path, 40))
    assert (kinds["GatherBlockQuantized"], kinds["MatMulNBits"], "Reshape" in kinds) == (2, 1, False)
    for a, b in zip(exact, rough, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(a).max())


LOOKED_UP = """g (int64[batch, time] ids, int64[batch] more) => (float[batch, time, N] y, float[batch, K] m)
<float[40, K] E, float[40, K] P>
{
    short = Cast <to = 6> (ids)
    x = Gather (E, short)
    at = Add (ids, ids)
    p = Gather (P, AT)
    h = Add (x, p)
    y = MatMul (h, W)
    m = Gather (E, more)
}"""


def looked_up(folder: Path, width: int, at: str) -> Path:
    text = LOOKED_UP.replace("AT", at).replace("N]", "16]").replace("K", str(width))
    text = text.replace(f"<float[40, {width}] E, float[40, {width}] P>\n", "")
    text = text.replace("more)", f"more, float[40, {width}] E, float[40, {width}] P, float[{width}, 16] W)", 1)
    ir.save(named(text), folder / "exact.onnx")
    return folder / "exact.onnx"


@pytest.mark.parametrize("width", [8, 64, 72])
@pytest.mark.parametrize("form", get_args(Quantize))
def test_an_embedding_has_eight_bits_in_every_form(form, width, tmp_path):
    source = looked_up(tmp_path, width, "ids")
    kinds, exact, rough = quantized(source, form)
    assert kinds["GatherBlockQuantized"] == 3
    assert "Gather" not in kinds
    assert 0 < np.abs(exact[1] - rough[1]).max() < 0.005 * np.abs(exact[1]).max()
    weights = {i.name: i for i in onnx.load(tmp_path / "made.onnx").graph.initializer}
    assert all(weights[f"{name}.levels"].data_type == onnx.TensorProto.UINT8 for name in "EP")
    assert not {"E", "P"} & set(weights)


def test_what_is_looked_up_by_numbers_that_the_file_computes_stays(tmp_path):
    """Positions, that is, and tables that turn by them."""
    feeds = {"ids": np.arange(20, dtype=np.int64)[None], "more": np.array([3, 39, 0], dtype=np.int64)}
    kinds, _, _ = quantized(looked_up(tmp_path, 64, "at"), "int8", feeds)
    assert (kinds["GatherBlockQuantized"], kinds["Gather"]) == (2, 1)
    found = products(ir.load(tmp_path / "exact.onnx"), ("MatMul",))
    assert (len(found.names), found.embeddings) == (1, 1)
    assert found.share == pytest.approx((64 * 16 + 40 * 64) / (64 * 16 + 2 * 40 * 64))


def test_a_table_of_zeros_stays_so(tmp_path):
    source = looked_up(tmp_path, 64, "ids")
    model = onnx.load(source)
    for held in model.graph.initializer:
        if held.name == "E":
            held.CopyFrom(onnx.numpy_helper.from_array(np.zeros((40, 64), np.float32), "E"))
    onnx.save(model, source)
    _, _, rough = quantized(source)
    assert not rough[1].any()
