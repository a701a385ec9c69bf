"""Which products of a graph hold whole numbers afterwards, and what the tools make of them; graphs are written as text.

B batch, T time
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.deploy.lowering.lean.test_lean import after, built
from thesean.deploy.quantizing import tools
from thesean.deploy.quantizing.products import products, split_gemms, turn_weights
from thesean.deploy.quantizing.quantized import Quantized
from thesean.deploy.quantizing.tools import quantize_file
from thesean.errors import ExportError


def named(text: str) -> Any:
    """Nodes are called by what they make."""
    model = built(text)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def test_products_by_a_matrix_of_floats_count_and_weights_of_two_once():
    model = named("""g (float[batch, time, 8] x, float[8, 8] W, float[8, 4] V, float[2, 8, 8] HEADS, float[100] B)
        => (float[batch, time, 8] twice, float[batch, time, 4] v, float[batch, time, 8] own, float[2, time, 8] h,
            float[batch, time, time] scores, float[batch, time, 100] b)
    {
        once = MatMul (x, W)
        twice = MatMul (once, W)
        v = MatMul (twice, V)
        own = com.microsoft.FusedMatMul (x, W)
        h = MatMul (once, HEADS)
        turned = Transpose <perm = [0, 2, 1]> (x)
        scores = MatMul (x, turned)
        b = Add (x, B)
    }""")
    found = products(model, ("MatMul",))
    assert found.names == ("once", "twice", "v")
    assert found.share == pytest.approx((64 + 32) / (64 + 32 + 128 + 100))
    assert products(model, ("Conv",)).names == ()
    assert products(model, ("Conv",)).share == 0


def test_weights_that_are_no_floats_or_none_at_all_do_not_count():
    model = named("g (float[2, 8] x, float[8, 4] W, float[8, 0] EMPTY) => (float[2, 4] y, float[2, 0] z)\n"
                  "{ y = MatMul (x, W) z = MatMul (x, EMPTY) }")  # fmt: skip
    assert products(model, ("MatMul",)).names == ("y",)
    weights = model.graph.initializers["W"]
    weights.const_value = ir.tensor(np.ones((8, 4), np.float64))
    assert products(model, ("MatMul",)).names == ()


def test_a_graph_without_weights_has_no_share_of_them():
    assert products(named("g (float[2, 2] x) => (float[2, 2] y) { y = MatMul (x, x) }"), ("MatMul",)).share == 0


GEMM = "g (float[batch, 8] x, float[8, 4] W, float[4] B) => (float[batch, 4] y) { y = Gemm ASKED (x, W, B) }"
TURNED = "g (float[batch, 8] x, float[4, 8] W, float[4] B) => (float[batch, 4] y) { y = Gemm <transB = 1> (x, W, B) }"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (GEMM.replace("ASKED", ""), ["MatMul", "Add"]),
        (TURNED, ["MatMul", "Add"]),
        (GEMM.replace("ASKED", "").replace(", B)", ")"), ["MatMul"]),
        (GEMM.replace("ASKED", "<alpha = 2.0>"), ["Gemm"]),
        (GEMM.replace("ASKED", "<beta = 2.0>"), ["Gemm"]),
        (TURNED.replace("transB = 1", "transA = 1, transB = 1").replace("[batch, 8]", "[8, 4]"), ["Gemm"]),
        (GEMM.replace("ASKED", "").replace("float[8, 4] W", "float[8, 4] w"), ["Gemm"]),
    ],
    ids=["plain", "turned", "without a bias", "alpha", "beta", "transA", "by an input"],
)
def test_a_gemm_is_a_product_and_a_sum_unless_it_does_more(text, left):
    if left == ["Gemm"]:
        model = built(text)
        assert split_gemms(model) == 0
        assert [n.op_type for n in model.graph] == left
    else:
        assert after(text, split_gemms) == left


def test_the_product_keeps_the_name_and_weights_that_nothing_reads_go():
    model = named(TURNED)
    split_gemms(model)
    assert [n.name for n in model.graph] == ["y", "y_bias"]
    assert {n: tuple(v.shape) for n, v in model.graph.initializers.items()} == {"W.transposed": (8, 4), "B": (4,)}
    both = TURNED.replace("=> (", "=> (float[4, 8] z, ").replace("{ y", "{ z = Neg (W) y")
    model = named(both)
    split_gemms(model)
    assert set(model.graph.initializers) == {"W", "W.transposed", "B"}


HEAD = """g (float[batch, time, 8] x, float[4, 8] W) => (float[batch, time, 4] y, float[4, 8] z)
{
    turned = Transpose <perm = [1, 0]> (W)
    y = MatMul (x, turned)
    z = Neg (W)
}"""


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (HEAD, ["MatMul", "Neg"]),
        (HEAD.replace(" <perm = [1, 0]>", ""), ["MatMul", "Neg"]),
        (HEAD.replace("Neg (W)", "Transpose <perm = [1, 0]> (turned)"), ["Transpose", "MatMul", "Transpose"]),
        (HEAD.replace("float[4, 8] W", "float[4, 8] w"), None),
        (HEAD.replace("[1, 0]", "[0, 1]").replace("float[4, 8]", "float[8, 8]").replace("time, 4]", "time, 8]"), None),
        (HEAD.replace("Transpose <perm = [1, 0]> (W)", "Neg (W)").replace("[4, 8]", "[8, 4]"), None),
    ],
    ids=["turned", "by default", "read twice", "an input", "as it lies", "no turn"],
)
def test_a_product_by_weights_that_are_turned_first_is_one_by_weights_that_lie_so(text, left):
    if left is None:
        assert turn_weights(built(text)) == 0
    else:
        assert after(text, turn_weights) == left


def test_an_embedding_that_is_the_head_too_is_a_matrix_of_each():
    model = named(HEAD)
    assert products(model, ("MatMul",)).names == ()
    turn_weights(model)
    assert products(model, ("MatMul",)).names == ("y",)
    assert {n: tuple(v.shape) for n, v in model.graph.initializers.items()} == {"W": (4, 8), "W.transposed": (8, 4)}
    alone = named(HEAD.replace(", float[4, 8] z", "").replace("    z = Neg (W)\n", ""))
    turn_weights(alone)
    assert set(alone.graph.initializers) == {"W.transposed"}


TIED = """g (int64[batch, time] ids, float[40, 64] E, float[64, 64] W) => (float[batch, time, 40] y)
{
    x = Gather (E, ids)
    h = MatMul (x, W)
    turned = Transpose <perm = [1, 0]> (E)
    y = MatMul (h, turned)
}"""


def test_a_table_that_is_the_head_too_has_eight_bits_in_int4(tmp_path):
    source, made = saved(TIED, tmp_path), tmp_path / "whole.onnx"
    found = quantize_file(source, made, "int4", [])
    assert (set(found.names), found.tables) == ({"h", "y"}, {"y": "E"})
    blocks = {n.name.removesuffix(f"_Q{b}"): b for n in onnx.load(made).graph.node if (b := bits_of(n))}
    assert blocks == {"x": 8, "h": 4, "y": 8}
    assert made.stat().st_size < 9000  # 40 x 64 bytes once, 64 x 64 half bytes, scales, zeros and names
    ids = np.arange(40, dtype=np.int64)[None]
    exact, rough = (
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0] for p in (source, made)
    )
    assert np.abs(rough - exact).max() < 0.3 * np.abs(exact).max()


def bits_of(node: Any) -> int:
    return next((a.i for a in node.attribute if a.name == "bits"), 0)


NETWORK = """g (float[batch, 64] x, float[64, 48] W, float[16, 48] V, float[16] B) => (float[batch, 16] y)
{
    h = MatMul (x, W)
    raised = Relu (h)
    y = Gemm <transB = 1> (raised, V, B)
}"""
FORMS = [("int8", "MatMulInteger", 0.05), ("int8-static", "QuantizeLinear", 0.1), ("int4", "MatMulNBits", 0.3)]


def saved(text: str, folder: Path) -> Path:
    ir.save(named(text), folder / "exact.onnx")
    return folder / "exact.onnx"


def run(path: Path, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize(("form", "operator", "bar"), FORMS)
def test_each_form_is_near_to_the_exact_file_and_a_fraction_of_its_size(form, operator, bar, tmp_path):
    exact, made = saved(NETWORK, tmp_path), tmp_path / "made.onnx"
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    found = quantize_file(exact, made, form, [{"x": x}])
    assert len(found.names) == 2
    assert found.share == pytest.approx((64 * 48 + 16 * 48) / (64 * 48 + 16 * 48 + 16))
    model = onnx.load(made)
    assert sum(n.op_type == operator for n in model.graph.node) >= 2
    kept = sum(np.prod(i.dims) for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT)
    assert kept < 500  # scales and biases
    wanted, got = run(exact, x), run(made, x)
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < bar


def test_a_scale_is_of_one_output_and_in_int4_of_32_features(tmp_path):
    """One feature, and one output, that is a thousand times larger leaves the others as near as they were."""
    exact, made = saved("g (float[batch, 64] x, float[64, 48] W) => (float[batch, 48] y) { y = MatMul (x, W) }",
                        tmp_path), tmp_path / "made.onnx"  # fmt: skip
    model = onnx.load(exact)
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[:, 3] *= 1000
    x = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "W"))
    onnx.save(model, exact)
    others = np.arange(48) != 3
    for form, bar in (("int8", 0.05), ("int4", 0.5)):
        quantize_file(exact, made, form, [])  # type: ignore[arg-type]
        off = np.abs(run(made, x) - run(exact, x))[:, others]
        assert off.max() < bar * np.abs(run(exact, x))[:, others].max()
    blocks = [a.i for n in onnx.load(made).graph.node for a in n.attribute if a.name == "block_size"]
    assert blocks == [32]


CONVOLUTION = """g (float[batch, 3, 8] x, float[4, 3, 3] W) => (float[batch, 4, 6] y) { y = Conv (x, W) }"""


def test_a_convolution_is_quantised_where_it_is_calibrated_and_told_of_elsewhere(tmp_path):
    exact = saved(CONVOLUTION, tmp_path)
    x = np.random.default_rng(1).standard_normal((5, 3, 8)).astype(np.float32)
    assert quantize_file(exact, tmp_path / "made.onnx", "int8-static", [{"x": x}]).names == ("y",)
    with pytest.raises(ExportError, match=r"^quantize='int8': .* Its convolutions are quantised by quantize='int8-s"):
        quantize_file(exact, tmp_path / "made.onnx", "int8", [])
    exact = saved("g (float[2, 2] x) => (float[2, 2] y) { y = Relu (x) }", tmp_path)
    with pytest.raises(ExportError, match=r"^quantize='int4': .* whole numbers\. Export it as it is\.$"):
        quantize_file(exact, tmp_path / "made.onnx", "int4", [])


def test_a_tool_that_fails_is_told_in_one_line(tmp_path):
    exact = saved(NETWORK, tmp_path)
    with pytest.raises(ExportError, match=r"^quantize='int8-static': onnxruntime's tool fails: \w+: [^\n]*$"):
        quantize_file(exact, tmp_path / "made.onnx", "int8-static", [{"x": np.zeros((1, 3), np.float32)}])


COSTS: dict[str, Any] = dict(
    form="int8", products=3, share=0.456, calibrated=0, samples="2 batches", divergence=0.0123, unit="nats",
    agreement=None, apart=None, exact_bytes=2_340_000, whole_ms=(4.0, 2.25), step_ms=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {},
            [
                "  int8: 3 products, 46% of the weights",
                "  from the exact file on 2 batches: 1.23e-02 nats",
                "  the exact file has 2.34 MB; 4 -> 2.25 ms a forward",
            ],
        ),
        (
            {"form": "int8-static", "calibrated": 6, "agreement": 0.98765, "apart": 0.1, "step_ms": (0.5, 0.25)},
            [
                "  int8-static: 3 products, 46% of the weights, calibrated on 6 batches",
                "  from the exact file on 2 batches: 1.23e-02 nats, the same answer at 98.77%",
                "  the exact file has 2.34 MB; 4 -> 2.25 ms a sequence; 0.5 -> 0.25 ms a step",
            ],
        ),
    ],
)
def test_what_whole_numbers_cost_is_told_in_a_few_lines(other, told):
    assert str(Quantized(**{**COSTS, **other})).splitlines() == told


def test_activations_of_one_scale_a_call_are_told_of():
    lines = str(Quantized(**{**COSTS, "apart": 0.01})).splitlines()
    assert lines[3].startswith("  chunks are 1.00e-02 nats from a whole sequence: activations have one scale a call")


def test_a_tool_that_sets_up_logging_leaves_the_callers_as_it_was():
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), root.manager.disable
    with tools._quiet():
        logging.basicConfig(level=logging.DEBUG, force=True)
        assert not root.isEnabledFor(logging.WARNING)
    assert (root.level, root.handlers, root.manager.disable) == (level, handlers, disabled)
