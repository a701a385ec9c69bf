"""An embedding that is the head too is looked up where the head's products read it, or stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.deploy.quantizing.test_products import named
from thesean.deploy.quantizing.tools import quantize_file

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


def quantized(source: Path) -> tuple[dict[str, int], list[np.ndarray], list[np.ndarray]]:
    """How many nodes of each kind, and what both files give."""
    made = source.with_name("made.onnx")
    quantize_file(source, made, "int4", ())
    feeds = {"ids": np.arange(40, dtype=np.int64)[None], "more": np.array([3, 39, 0], dtype=np.int64)}
    exact, rough = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, feeds) for p in (source, made)
    )
    kinds = [n.op_type for n in onnx.load(made).graph.node]
    return {kind: kinds.count(kind) for kind in kinds}, exact, rough


def test_all_that_look_up_rows_do_so_where_the_product_reads_them(tmp_path):
    kinds, exact, rough = quantized(written(tmp_path))
    assert kinds == {"Reshape": 1, "GatherBlockQuantized": 2, "MatMulNBits": 1, "Neg": 1}
    for a, b in zip(exact, rough, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(a).max())
    steps = {i.name: list(i.dims) for i in onnx.load(tmp_path / "made.onnx").graph.initializer}
    assert sorted(np.prod(dims) for dims in steps.values()) == [2, 80, 40 * 64]


@pytest.mark.parametrize(
    ("width", "read", "out"),
    [
        (64, "Neg (E)", "float[40, WIDTH]"),
        (64, "Gather <axis = 1> (E, more)", "float[40, batch]"),
        (40, "Neg (x)", "float[batch, time, WIDTH]"),
    ],
    ids=["read by another", "columns are looked up", "rows of no whole blocks"],
)
def test_a_table_that_is_read_otherwise_stays(tmp_path, width, read, out):
    kinds, exact, rough = quantized(written(tmp_path, width, read, out))
    assert "GatherBlockQuantized" not in kinds
    assert kinds["MatMulNBits"] == 1
    np.testing.assert_array_equal(exact[1], rough[1])
