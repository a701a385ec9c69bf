"""Passes on the ONNX graph: what stands before and after, and the same numbers in onnxruntime.

A graph is written as text. Inputs whose names begin with a capital are weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thesean.deploy.lowering.lean.divide_rows import divide_rows
from thesean.deploy.lowering.lean.fold_weights import fold_weights
from thesean.deploy.lowering.lean.fuse_gelu import fuse_gelu
from thesean.deploy.lowering.lean.fuse_rms_norm import fuse_rms_norm
from thesean.deploy.lowering.lean.join_products import join_products
from thesean.deploy.lowering.lean.leaner import leaner
from thesean.deploy.lowering.lean.plain_softplus import plain_softplus
from thesean.deploy.lowering.lean.products_of_rows import products_of_rows
from thesean.deploy.lowering.lean.reshape_by_constant import reshape_by_constant
from thesean.deploy.lowering.lean.share_counters import share_counters
from thesean.deploy.lowering.lean.split_later import split_later
from thesean.deploy.lowering.lean.split_rows import split_rows
from thesean.deploy.lowering.lean.split_slices import split_slices
from thesean.deploy.lowering.lean.sum_residuals import sum_residuals

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

X = "float[batch, time, 8] x"
SIZES = ((2, 7), (1, 1), (3, 2))


def built(text: str) -> Any:
    head = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
    model = ir.from_proto(onnx.parser.parse_model(head + text))
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if value.name[0].isupper():
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(rng.standard_normal([int(d) for d in value.shape]).astype(np.float32))
            model.graph.register_initializer(value)
    return model


def run(model: Any, scale: float = 1.0) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found: list[Any] = []
    for batch, time in SIZES:
        rng, sizes = np.random.default_rng(batch), {"batch": batch, "time": time, "past": 0}
        shapes = {i.name: [sizes.get(d, d) for d in i.shape] for i in session.get_inputs()}
        feeds = {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        found += session.run(None, feeds)
    return found


def after(text: str, change: Callable[[Any], int], count: int = 1, scale: float = 1.0) -> list[str]:
    """The operators that are left; the pass said that it changed `count` places, and the numbers are the same."""
    model = built(text)
    names = [v.name for v in model.graph.outputs]
    expected = run(model, scale)
    assert change(model) == count
    for value in {v for node in model.graph for v in node.inputs if v is not None}:
        assert all(use.node.graph is model.graph for use in value.uses())  # or later passes count who is gone
    assert [v.name for v in model.graph.outputs] == names
    for found, known in zip(run(model, scale), expected, strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-5, atol=2e-6)
    return [node.op_type for node in model.graph]


VIEW = f"""g ({X}) => (float[batch, time, 2, 4] y)
{{
    b = Shape <start = 0, end = 1> (x)
    t = Shape <start = 1, end = 2> (x)
    two = Constant <value_ints = [2]> ()
    four = Constant <value_ints = [4]> ()
    s = Concat <axis = 0> (b, t, two, four)
    y = Reshape (x, s)
}}"""


def test_a_shape_that_is_computed_from_shapes_is_a_constant():
    model = built(VIEW)
    assert reshape_by_constant(model) == 1
    (node,) = (n for n in model.graph if n.op_type == "Reshape")
    assert node.inputs[1].const_value.numpy().tolist() == [0, 0, 2, 4]
    assert after(VIEW, reshape_by_constant).count("Reshape") == 1


def test_a_view_as_what_it_is_goes_and_one_that_comes_back_too():
    text = f"""g ({X}) => (float[batch, time, 8] y)
    <float[batch, time, 8] same, float[batch, time, 2, 4] apart, float[batch, time, 8] back>
    {{
        s = Shape (x)
        same = Reshape (x, s)
        four = Constant <value_ints = [0, 0, 2, 4]> ()
        apart = Reshape (same, four)
        three = Constant <value_ints = [0, 0, 8]> ()
        back = Reshape (apart, three)
        y = Neg (back)
    }}"""
    model = built(text)
    reshape_by_constant(model)
    left = [n for n in model.graph if n.op_type == "Neg"]
    assert left[0].inputs[0].name == "x"
    assert [n.outputs[0].name for n in model.graph if n.op_type == "Reshape"] == ["apart"]  # which nothing reads


def test_a_size_is_not_left_to_a_division_by_what_may_be_empty():
    text = """g (float[batch, past, 8] x) => (float[batch, past, n, 4] y)
    {
        s = Constant <value_ints = [1, 1, 2, 4]> ()
        y = Identity (z)
    }"""
    text = text.replace("y = Identity (z)", "y = Reshape (x, s)")
    assert reshape_by_constant(built(text)) == 0


def test_the_one_size_that_is_not_known_is_what_is_left():
    text = """g (float[batch, time, 8] x) => (float[batch, n] y)
    {
        b = Shape <start = 0, end = 1> (x)
        rest = Constant <value_ints = [-1]> ()
        s = Concat <axis = 0> (b, rest)
        y = Reshape (x, s)
    }"""
    model = built(text)
    assert reshape_by_constant(model) == 1
    (node,) = (n for n in model.graph if n.op_type == "Reshape")
    assert node.inputs[1].const_value.numpy().tolist() == [0, -1]
    after(text, reshape_by_constant)
    two = text.replace("float[batch, n] y", "float[m, n] y")
    assert reshape_by_constant(built(two)) == 0


SOFTPLUS = f"""g ({X}) => (float[batch, time, 8] y)
{{
    threshold = Constant <value = float {{THRESHOLD}}> ()
    over = Greater (x, threshold)
    soft = Softplus (x)
    y = Where (over, x, soft)
}}"""


def constants_lifted(model: Any) -> None:
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def lifted(change: Callable[[Any], int]) -> Callable[[Any], int]:
    """After constants became initializers, as torch's exporter leaves them."""

    def both(model: Any) -> int:
        constants_lifted(model)
        return change(model)

    return both


COUNTED = """g ({x}, int64[batch] state_in_0, int64[batch] state_in_1) =>
    (float[batch, time, 8] y, int64[batch] state_out_0, int64[batch] state_out_1)
{{
    first = Constant <value_ints = [1]> ()
    t0 = Shape <start = 1, end = 2> (x)
    t1 = Shape <start = 1, end = 2> (x)
    f0 = Cast <to = 1> (state_in_0)
    f1 = Cast <to = 1> (state_in_1)
    c0 = Cos (f0)
    c1 = Cos (f1)
    u0 = Reshape (c0, places)
    u1 = Reshape (c1, places)
    a = Mul (x, u0)
    y = Add (a, u1)
    state_out_0 = Add (state_in_0, t0)
    state_out_1 = Add ({by}, state_in_1)
}}
"""


@pytest.mark.parametrize(("by", "cosines"), [("t1", 1), ("first", 2)], ids=["alike", "by other numbers"])
def test_counters_that_count_alike_are_read_as_one(by, cosines):
    """Each is carried on by itself still. They begin at 0: a run from there is the same before and after."""
    text = COUNTED.format(x=X, by=by).replace("{\n", "{\n    places = Constant <value_ints = [-1, 1, 1]> ()\n", 1)
    plain, shared = built(text), built(text)
    share_counters(shared)
    assert [n.op_type for n in shared.graph].count("Cos") == cosines
    state = [np.zeros(2, np.int64)] * 2
    for time in (3, 1, 2):
        x = np.random.default_rng(time).standard_normal((2, time, 8)).astype(np.float32)
        found = [_run(model, {"x": x, "state_in_0": state[0], "state_in_1": state[1]}) for model in (plain, shared)]
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)
        state = found[0][1:]


def _run(model: Any, feeds: dict[str, Any]) -> list[Any]:
    proto = ir.to_proto(model).SerializeToString()
    made: list[Any] = ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, feeds)
    return made


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_softplus_needs_no_threshold(scale):
    assert after(SOFTPLUS.replace("THRESHOLD", "20.0"), lifted(plain_softplus), scale=scale) == ["Softplus"]


def test_one_whose_threshold_changes_numbers_stays():
    assert "Where" in after(SOFTPLUS.replace("THRESHOLD", "3.0"), lifted(plain_softplus), count=0)


GEMM = """g (float[batch, time, 8] x, float[8, 4] W, float[4] B) => (float[batch, time, 4] y)
<float[n, 8] flat, float[n, 4] made>
{
    rows = Constant <value_ints = [-1, 8]> ()
    flat = Reshape (x, rows)
    made = Gemm (flat, W, B)
    b = Shape <start = 0, end = 2> (x)
    four = Constant <value_ints = [4]> ()
    s = Concat <axis = 0> (b, four)
    y = Reshape (made, s)
}"""


def test_a_product_of_rows_keeps_its_dimensions():
    kinds = after(GEMM, products_of_rows)
    assert [k for k in kinds if k not in ("Constant", "Shape", "Concat")] == ["MatMul", "Add"]
    turned = GEMM.replace("float[8, 4] W", "float[4, 8] W").replace("Gemm (", "Gemm <transB = 1> (")
    assert "Transpose" in after(turned, products_of_rows)
    assert "Gemm" in after(GEMM.replace("Gemm (", "Gemm <alpha = 2.0> ("), products_of_rows, count=0)


@pytest.mark.parametrize(
    ("was", "found"),
    [
        ("(flat, W, B)", "<beta = 2.0> (flat, W, B)"),
        ("float[4] B", "float[1, 4] B"),
        ("float[4] B", "float[1] B"),
    ],
)
def test_a_product_that_is_otherwise_stays(was, found):
    assert was in GEMM
    assert "Gemm" in after(GEMM.replace(was, found), products_of_rows, count=0)


def test_a_product_whose_rows_change_places_stays():
    text = GEMM.replace("=> (float[batch, time, 4] y)", "=> (float[time, batch, 4] y)")
    text = text.replace("b = Shape <start = 0, end = 2> (x)", "o = Shape <start = 0, end = 1> (x)\n    "
                        "t = Shape <start = 1, end = 2> (x)\n    b = Concat <axis = 0> (t, o)")  # fmt: skip
    assert "Gemm" in after(text, products_of_rows, count=0)


def test_a_product_of_pieces_of_rows_stays():
    text = GEMM.replace("[-1, 8]", "[-1, 4]").replace("float[n, 8] flat", "float[n, 4] flat")
    text = text.replace("float[8, 4] W", "float[4, 4] W").replace("[4]> ()", "[8]> ()")
    text = text.replace("time, 4] y", "time, 8] y")
    assert "Gemm" in after(text.replace(", B)", ")").replace(", float[4] B", ""), products_of_rows, count=0)


def test_heads_are_flattened_before_their_product():
    text = GEMM.replace("float[batch, time, 8] x", "float[batch, time, 2, 4] x")
    kinds = after(text, products_of_rows)
    assert [k for k in kinds if k not in ("Constant", "Shape", "Concat")] == ["Reshape", "MatMul", "Add"]


FOLD = f"""g ({X}, float[4, 8] W, float[8, 8] M) => (float[batch, time, 4] y)
<float[4, 8] folded, float[8, 4] turned>
{{
    folded = MatMul (W, M)
    turned = Transpose <perm = [1, 0]> (folded)
    y = MatMul (x, turned)
}}"""


def divided(below: str) -> str:
    return f"""g ({X}, float[batch, time, 2] n, float[1] C) => (float[batch, time, 8] y)
    <float[batch, time, 2, 4] x4, float[batch, time, 2, 1] n4, float[batch, time, 2, 1] n5,
     float[batch, time, 2, 4] d>
    {{
        s4 = Constant <value_ints = [0, 0, 2, 4]> ()
        s1 = Constant <value_ints = [0, 0, 2, 1]> ()
        s3 = Constant <value_ints = [0, 0, 8]> ()
        x4 = Reshape (x, s4)
        n4 = Reshape (n, s1)
        {below}
        d = Div (x4, n5)
        y = Reshape (d, s3)
    }}"""


@pytest.mark.parametrize("below", ["n5 = Add (n4, C)", "n5 = Add (C, n4)"])
def test_heads_are_divided_as_one_row(below):
    assert after(divided(below), divide_rows) == ["Constant"] * 3 + ["Add", "MatMul", "Div"]


def test_without_a_sum_too():
    text = divided("n5 = Identity (n4)").replace("n5 = Identity (n4)", "").replace("Div (x4, n5)", "Div (x4, n4)")
    model = built(text)
    assert divide_rows(model) == 1
    (ones,) = (v for name, v in model.graph.initializers.items() if name.startswith("ones"))
    assert ones.const_value.numpy().tolist() == [[[1] * 4 + [0] * 4, [0] * 4 + [1] * 4]]
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == ["MatMul", "Div"]


@pytest.mark.parametrize("below", ["n5 = Add (n4, n4)", "n5 = Mul (n4, C)"])
def test_numbers_that_come_otherwise_stay(below):
    assert after(divided(below), divide_rows, 0).count("MatMul") == 0


def test_what_is_computed_from_weights_is_a_weight_and_the_weights_go():
    model = built(FOLD)
    assert fold_weights(model) == 2
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert [tuple(v.shape) for v in model.graph.initializers.values()] == [(8, 4)]
    after(FOLD, fold_weights, count=2)


def test_a_large_weight_that_two_nodes_read_is_not_written_twice():
    text = """g (float[batch, time, 64] x, float[64, 64] W) => (float[batch, time, 64] y, float[batch, time, 64] z)
    <float[64, 64] turned>
    {
        turned = Transpose <perm = [1, 0]> (W)
        y = MatMul (x, turned)
        z = MatMul (x, W)
    }"""
    assert after(text, fold_weights, count=0) == ["Transpose", "MatMul", "MatMul"]


@pytest.mark.parametrize(("mode", "count"), [("", 1), ('<mode = "constant">', 1), ('<mode = "reflect">', 0)])
def test_a_weight_is_padded_by_zeros_alone(mode, count):
    text = f"""g ({X.replace("8", "4")}, float[2, 3] W) => (float[batch, time, 6] y)
    <int64[4] p = {{1, 2, 1, 1}}, float[4, 6] padded>
    {{
        padded = Pad {mode} (W, p)
        y = MatMul (x, padded)
    }}"""
    assert after(text, fold_weights, count=count) == ["Pad"] * (1 - count) + ["MatMul"]


@pytest.mark.parametrize("axes", ["", ", axes"])
def test_a_pad_of_some_axes_is_left_as_it_is(axes):
    text = f"""g ({X.replace("8", "3")}, float[2, 3] W) => (float[batch, time, 3] y)
    <int64[2] p = {{1, 0}}, float zero = {{0.0}}, int64[1] axes = {{0}}, float[3, 3] padded>
    {{
        padded = Pad (W, p, zero{axes})
        y = MatMul (x, padded)
    }}"""
    if not axes:
        text = text.replace("int64[2] p = {1, 0}", "int64[4] p = {1, 0, 0, 0}")
    assert after(text, fold_weights, count=int(not axes)) == ["Pad"] * bool(axes) + ["MatMul"]


JOIN = f"""g ({X}, float[8, 4] W, float[4] B, float[8, 6] V, float[8, 2] U, float[2] C)
    => (float[batch, time, 4] q, float[batch, time, 6] k, float[batch, time, 2] v)
{{
    a = MatMul (x, W)
    biased = Add (B, a)
    q = Neg (biased)
    b = MatMul (x, V)
    k = Neg (b)
    c = MatMul (x, U)
    gate = Add (c, C)
    v = Neg (gate)
}}"""


def inferred(change: Callable[[Any], int]) -> Callable[[Any], int]:
    def both(model: Any) -> int:
        from onnx_ir.passes.common import ShapeInferencePass

        ShapeInferencePass()(model)
        return change(model)

    return both


def test_products_of_one_input_are_one():
    assert after(JOIN, inferred(join_products)) == ["MatMul", "Add", "Split", "Neg", "Neg", "Neg"]


def test_a_product_by_a_weight_that_others_read_stays_alone():
    text = JOIN.replace("=> (", "=> (float[batch, time, 4] w, ").replace("q = Neg", "w = MatMul (x, W)\n    q = Neg")
    kinds = after(text, inferred(join_products))
    assert kinds.count("MatMul") == 3


@pytest.mark.parametrize(("columns", "products"), [(64, 2), (63, 3)])
def test_one_that_is_small_beside_the_others_is_written_twice(columns, products):
    """8 columns, an eighth of the others', or more than that."""
    text = f"""g ({X}, float[8, 8] W, float[8, 32] V, float[8, {columns - 32}] U)
        => (float[batch, time, 8] q, float[batch, time, 8] w, float[batch, time, 32] k,
            float[batch, time, {columns - 32}] v)
    {{
        turned = Neg (x)
        w = MatMul (turned, W)
        a = MatMul (x, W)
        q = Neg (a)
        b = MatMul (x, V)
        k = Neg (b)
        c = MatMul (x, U)
        v = Neg (c)
    }}"""
    assert after(text, inferred(join_products)).count("MatMul") == products


TANH = f"""g ({X}, float[8] B) => (float[batch, time, 8] y)
{{
    h = Add (x, B)
    half = Constant <value = float {{0.5}}> ()
    three = Constant <value = float {{3.0}}> ()
    cube = Constant <value = float {{0.044715}}> ()
    root = Constant <value = float {{0.7978845608}}> ()
    one = Constant <value = float {{ONE}}> ()
    a = Mul (h, half)
    p = Pow (h, three)
    c = Mul (p, cube)
    s = Add (h, c)
    r = Mul (s, root)
    t = Tanh (r)
    u = Add (t, one)
    y = Mul (a, u)
}}"""


def test_a_gelu_by_tanh_is_one_node_with_its_bias():
    assert after(TANH.replace("{ONE}", "{1.0}"), inferred(lifted(fuse_gelu))) == ["FastGelu"]


@pytest.mark.parametrize(
    ("was", "found"),
    [
        ("{1.0}", "{2.0}"),
        ("{0.5}", "{0.4}"),
        ("{3.0}", "{2.0}"),
        ("{0.044715}", "{0.04}"),
        ("{0.7978845608}", "{0.8}"),
        ("Add (h, c)", "Add (x, c)"),
        ("Pow (h, three)", "Pow (x, three)"),
        ("Mul (h, half)", "Mul (x, half)"),
        ("Tanh (r)", "Sigmoid (r)"),
    ],
)
def test_what_is_nearly_a_gelu_stays(was, found):
    text = TANH.replace("{ONE}", "{1.0}")
    assert was in text
    assert "FastGelu" not in after(text.replace(was, found), inferred(lifted(fuse_gelu)), count=0)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("y = Gelu <approximate = \"tanh\"> (x)", ["FastGelu"]),
        ("h = Add (x, B)\n y = Gelu (h)", ["BiasGelu"]),
        ("s = Sigmoid (x)\n y = Mul (s, x)", ["QuickGelu"]),
    ],
)  # fmt: skip
def test_other_activations_that_onnxruntime_has(body, left):
    assert after(f"g ({X}, float[8] B) => (float[batch, time, 8] y) {{ {body} }}", inferred(fuse_gelu)) == left


def test_half_precision_keeps_what_onnxruntime_has_kernels_for():
    text = "g (float16[batch, 8] x) => (float16[batch, 8] y) { s = Sigmoid (x) y = Mul (s, x) }"
    assert fuse_gelu(built(text)) == 0


NORM = f"""g ({X}, float[8] W) => (float[batch, time, 8] y)
{{
    two = Constant <value = float {{2.0}}> ()
    axis = Constant <value_ints = [AXIS]> ()
    eps = Constant <value = float {{0.00001}}> ()
    p = Pow (x, two)
    m = ReduceMean <keepdims = 1> (p, axis)
    a = Add (m, eps)
    s = Sqrt (a)
    r = Reciprocal (s)
    n = Mul (OTHER, r)
    y = Mul (W, n)
}}"""


@pytest.mark.parametrize("axis", ["-1", "2"])
def test_a_norm_by_the_root_of_the_mean_square_is_one_node(axis):
    text = NORM.replace("AXIS", axis).replace("OTHER", "x")
    assert after(text, inferred(lifted(fuse_rms_norm))) == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceSum"])
def test_one_without_weights_is_too_and_so_is_a_row_of_length_one(kind):
    text = NORM.replace("AXIS", "-1").replace("    n = Mul (OTHER, r)\n    y = Mul (W, n)", "    y = Mul (x, r)")
    assert after(text.replace("ReduceMean", kind), inferred(lifted(fuse_rms_norm))) == ["SimplifiedLayerNormalization"]


def test_a_sum_of_squares_with_a_weight_is_not_taken_for_a_mean():
    text = NORM.replace("AXIS", "-1").replace("OTHER", "x").replace("ReduceMean", "ReduceSum")
    assert after(text, inferred(lifted(fuse_rms_norm))) == ["SimplifiedLayerNormalization", "Mul"]


@pytest.mark.parametrize(("axis", "x"), [("1", "x"), ("-1", "p")])
def test_what_is_nearly_such_a_norm_stays(axis, x):
    text = NORM.replace("AXIS", axis).replace("OTHER", x)
    assert "Reciprocal" in after(text, inferred(lifted(fuse_rms_norm)), count=0)


RESIDUAL = f"""g ({X}, float[batch, time, 8] r, float[8, 8] W, float[8] B) => (float[batch, time, 8] y)
{{
    a = MatMul (x, W)
    b = Add (a, B)
    y = Add (r, b)
}}"""


def test_a_bias_goes_into_the_residual_sum():
    assert after(RESIDUAL, inferred(sum_residuals)) == ["MatMul", "Sum"]
    kept = RESIDUAL.replace("=> (", "=> (float[batch, time, 8] z, ").replace("y = Add", "z = Neg (b)\n y = Add")
    assert "Sum" not in after(kept, inferred(sum_residuals), count=0)


SLICES = f"""g ({X}) => (float[batch, time, 3] y, float[batch, time, 5] z)
{{
    none = Constant <value_ints = [0]> ()
    three = Constant <value_ints = [3]> ()
    end = Constant <value_ints = [END]> ()
    axis = Constant <value_ints = [2]> ()
    y = Slice (x, none, three, axis)
    z = Slice (x, three, end, axis)
}}"""


def test_slices_that_take_all_are_one_split():
    assert after(SLICES.replace("END", str(2**63 - 1)), lifted(split_slices)) == ["Split"]


def test_the_axis_may_be_counted_from_the_end_and_the_value_be_made_late():
    text = SLICES.replace("END", str(2**63 - 1)).replace(
        "axis = Constant <value_ints = [2]>", "axis = Constant <value_ints = [-1]>"
    )
    assert after(text, lifted(split_slices)) == ["Split"]
    text = text.replace("Slice (x", "Slice (late").replace("y = Slice", "late = Neg (x)\n    y = Slice")
    assert after(text, inferred(lifted(split_slices))) == ["Neg", "Split"]


def test_slices_in_strides_stay_and_those_of_a_stride_of_one_do_not():
    text = SLICES.replace("END", "8").replace("axis)", "axis, stride)")
    text = text.replace("none = ", "stride = Constant <value_ints = [STRIDE]> ()\n    none = ")
    assert after(text.replace("STRIDE", "1"), lifted(split_slices)) == ["Split"]
    two = text.replace("STRIDE", "2").replace("time, 3] y", "time, 2] y").replace("time, 5] z", "time, 3] z")
    assert after(two, lifted(split_slices), count=0) == ["Slice", "Slice"]


def test_slices_that_leave_something_stay():
    text = SLICES.replace("END", "7").replace("time, 5]", "time, 4]")
    assert after(text, lifted(split_slices), count=0) == ["Slice", "Slice"]


def test_a_slice_of_what_was_joined_is_the_part():
    text = """g (float[batch, 3] a, float[batch, 2] b) => (float[batch, 2] y)
    <float[batch, 5] all, float[batch, 2] part>
    {
        all = Concat <axis = 1> (a, b)
        start = Constant <value_ints = [-2]> ()
        end = Constant <value_ints = [5]> ()
        axis = Constant <value_ints = [1]> ()
        part = Slice (all, start, end, axis)
        y = Neg (part)
    }"""
    assert after(text, lifted(split_slices)) == ["Neg"]


@pytest.mark.parametrize(
    ("axis", "start", "end", "left"),
    [
        (1, 0, 2, ["Neg"]),
        (1, 2, 4, ["Neg"]),
        (1, 1, 3, ["Concat", "Slice", "Neg"]),
        (2, 0, 2, ["Concat", "Slice", "Neg"]),
    ],
)
def test_a_slice_is_a_part_where_it_is_all_of_one_on_the_axis_of_the_parts(axis, start, end, left):
    made = "float[batch, 2, 4] y" if axis == 1 else "float[batch, 4, 2] y"
    text = f"""g (float[batch, 2, 4] a, float[batch, 2, 4] b) => ({made}) <float[batch, 4, 4] all>
    {{
        all = Concat <axis = 1> (a, b)
        start = Constant <value_ints = [{start}]> ()
        end = Constant <value_ints = [{end}]> ()
        axis = Constant <value_ints = [{axis}]> ()
        part = Slice (all, start, end, axis)
        y = Neg (part)
    }}"""
    assert after(text, lifted(split_slices), count=int(len(left) == 1)) == left


def test_behind_a_part_of_unknown_size_no_part_is_known():
    """`first` of 2 would lie where b does, were the one before it passed over."""
    text = """g (float[past, 4] a, float[2, 4] b) => (float[2, 4] y) <float[6, 4] all>
    {
        all = Concat <axis = 0> (a, b)
        start = Constant <value_ints = [0]> ()
        end = Constant <value_ints = [2]> ()
        axis = Constant <value_ints = [0]> ()
        first = Slice (all, start, end, axis)
        y = Neg (first)
    }"""
    model = built(text)
    lifted(split_slices)(model)
    (negated,) = (n for n in model.graph if n.op_type == "Neg")
    assert negated.inputs[0].name == "first"


ROWS = f"""g ({X}, float[8, 15] W, float[15] B) => (float[batch, time, 12] y, float[batch, time, 3] z)
<float[batch, time, 15] flat, float[batch, time, 3, 5] heads, float[batch, time, 3, 4] v, float[batch, time, 3, 1] w>
{{
    a = MatMul (x, W)
    flat = Add (a, B)
    s = Constant <value_ints = [0, 0, 3, 5]> ()
    heads = Reshape (flat, s)
    sizes = Constant <value_ints = [4, 1]> ()
    v, w = Split <axis = 3> (heads, sizes)
    all = Constant <value_ints = [0, 0, -1]> ()
    y = Reshape (v, all)
    z = Reshape (w, all)
}}"""


def test_parts_within_heads_are_columns_of_the_product_that_made_them():
    assert after(ROWS, inferred(lifted(split_rows))) == ["MatMul", "Add", "Split"]


def test_parts_between_heads_are_flat_already():
    text = ROWS.replace("axis = 3", "axis = 2").replace("[4, 1]", "[1, 2]").replace("12] y", "5] y")
    text = text.replace("3] z", "10] z").replace("3, 4] v", "1, 5] v").replace("3, 1] w", "2, 5] w")
    assert after(text, inferred(lifted(split_rows))) == ["MatMul", "Add", "Reshape", "Reshape", "Split"]


def test_a_split_of_a_split_is_one():
    text = f"""g ({X}) => (float[batch, time, 2] a, float[batch, time, 1] b, float[batch, time, 5] c)
    <float[batch, time, 3] some>
    {{
        outer = Constant <value_ints = [3, 5]> ()
        some, rest = Split <axis = 2> (x, outer)
        c = Neg (rest)
        inner = Constant <value_ints = [2, 1]> ()
        a, b = Split <axis = 2> (some, inner)
    }}"""
    assert after(text, inferred(lifted(split_rows))) == ["Split", "Neg"]


@pytest.mark.parametrize(("outer", "inner"), [("<axis = 2>", "<axis = -1>"), ("<axis = -1>", "<axis = 2>")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_whichever_part_is_split_the_others_keep_their_places(outer, inner, which):
    parts = ["p0", "p1", "p2"]
    kept = [n for n in parts if n != parts[which]]
    sizes = [2, 2, 2]
    sizes[which] = 4
    text = f"""g ({X}) => (float[batch, time, 1] a, float[batch, time, 3] b, {
        ", ".join(f"float[batch, time, 2] {n}_out" for n in kept)
    })
    {{
        sizes = Constant <value_ints = {sizes}> ()
        {", ".join(parts)} = Split {outer} (x, sizes)
        {" ".join(f"{n}_out = Neg ({n})" for n in kept)}
        more = Constant <value_ints = [1, 3]> ()
        a, b = Split {inner} ({parts[which]}, more)
    }}"""
    assert after(text, inferred(lifted(split_rows))) == ["Split", "Neg", "Neg"]


def test_a_split_of_rows_without_an_axis_is_one_too_and_one_of_another_axis_stays():
    text = """g (float[6, 8] x) => (float[1, 8] a, float[1, 8] b, float[4, 8] c)
    {
        outer = Constant <value_ints = [2, 4]> ()
        some, rest = Split (x, outer)
        c = Neg (rest)
        inner = Constant <value_ints = [1, 1]> ()
        a, b = Split (some, inner)
    }"""
    assert after(text, inferred(lifted(split_rows))) == ["Split", "Neg"]
    other = text.replace("Split (some, inner)", "Split <axis = 1> (some, inner)").replace("[1, 1]", "[4, 4]")
    other = other.replace("float[1, 8] a, float[1, 8] b", "float[2, 4] a, float[2, 4] b")
    assert after(other, inferred(lifted(split_rows)), count=0) == ["Split", "Neg", "Split"]


@pytest.mark.parametrize(
    "changes",
    [
        {"=> (": "=> (float[batch, time, 15] o, ", "a = MatMul": "m = Neg (x)\n    o = MatMul (m, W)\n    a = MatMul"},
        {"float[15] B": "float[batch, time, 15] b", "(a, B)": "(a, b)"},
        {"float[8, 15] W": "float[8, 15] m", "(x, W)": "(x, m)"},
        {"float[15] B": "float[1] B"},
        {"a = MatMul (x, W)": "m = MatMul (x, W)\n    a = Neg (m)"},
    ],
    ids=["its matrix is read elsewhere", "no bias", "no weights", "a bias for all", "no product"],
)
def test_heads_that_no_product_of_their_own_made_stay(changes):
    text = ROWS
    for was, found in changes.items():
        assert was in text
        text = text.replace(was, found, 1)
    assert "Reshape" in after(text, inferred(lifted(split_rows)), count=0)


def test_heads_of_a_number_that_is_not_known_stay():
    text = """g (float[batch, time, heads, 8] x) => (float[batch, time, some] y, float[batch, time, some] z)
    {
        sizes = Constant <value_ints = [4, 4]> ()
        v, w = Split <axis = 3> (x, sizes)
        all = Constant <value_ints = [0, 0, -1]> ()
        y = Reshape (v, all)
        z = Reshape (w, all)
    }"""
    assert lifted(split_rows)(built(text)) == 0


HEADS = """g (float[batch, time, 16] x)
    => (float[batch, 2, time, 4] q, float[batch, 1, time, 4] k, float[batch, 1, time, 4] v)
    <float[batch, time, 2, 4] a, float[batch, time, 1, 4] b, float[batch, time, 1, 4] c>
{
    sizes = Constant <value_ints = [8, 4, 4]> ()
    rows, keys, values = Split <axis = 2> (x, sizes)
    two = Constant <value_ints = [0, 0, 2, 4]> ()
    one = Constant <value_ints = [0, 0, 1, 4]> ()
    a = Reshape (rows, two)
    q = Transpose <perm = [0, 2, 1, 3]> (a)
    b = Reshape (keys, one)
    k = Transpose <perm = [0, 2, 1, 3]> (b)
    c = Reshape (values, one)
    v = Transpose <perm = [0, 2, 1, 3]> (c)
}"""


def test_heads_are_made_and_transposed_once_before_they_are_cut():
    assert after(HEADS, inferred(lifted(split_later))) == ["Reshape", "Transpose", "Split"]
    other = HEADS.replace("[0, 2, 1, 3]> (c)", "[0, 2, 3, 1]> (c)").replace("1, time, 4] v", "1, 4, time] v")
    assert "Split" in after(other, inferred(lifted(split_later)), count=0)[:1]


def test_heads_whose_rows_are_put_together_are_cut_first():
    text = """g (float[2, 6, 16] x) => (float[3, 2, 4, 4] q, float[3, 2, 4, 4] k)
    {
        sizes = Constant <value_ints = [8, 8]> ()
        rows, keys = Split <axis = 2> (x, sizes)
        heads = Constant <value_ints = [3, 4, 2, 4]> ()
        a = Reshape (rows, heads)
        q = Transpose <perm = [0, 2, 1, 3]> (a)
        b = Reshape (keys, heads)
        k = Transpose <perm = [0, 2, 1, 3]> (b)
    }"""
    assert inferred(lifted(split_later))(built(text)) == 0


def test_all_together_leave_what_a_layer_needs():
    def all_of_them(model: Any) -> int:
        leaner(model)
        return 1

    assert after(JOIN, inferred(all_of_them)) == ["MatMul", "Add", "Split", "Neg", "Neg", "Neg"]
    assert after(RESIDUAL, inferred(all_of_them)) == ["MatMul", "Sum"]


def test_an_operator_of_onnxruntimes_own_brings_its_opset():
    model = built(f"g ({X}) => (float[batch, time, 8] y) {{ s = Sigmoid (x)\n y = Mul (s, x) }}")
    del model.graph.opset_imports["com.microsoft"]
    leaner(model)
    assert [n.op_type for n in model.graph] == ["QuickGelu"]
    assert model.graph.opset_imports["com.microsoft"] == 1
