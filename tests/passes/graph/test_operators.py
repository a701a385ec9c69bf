from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from thesean.errors import ArtifactError
from thesean.passes.graph.graph_json import dump, load
from thesean.passes.graph.operators import check_values, names, operators

aten = torch.ops.aten
OVERLOADS = {name: f for name, f in operators().items() if isinstance(f, torch._ops.OpOverload)}

# what reads past a tensor, corrupts the heap, divides by zero, changes the process, or gives memory as it was found
UNSAFE = [
    "_reshape_alias.default", "as_strided.default", "as_strided_copy.default", "_sparse_coo_tensor_unsafe.default",
    "segment_reduce.default", "_ctc_loss.default", "ctc_loss.IntList", "set_.source_Tensor", "empty.memory_format",
    "empty_like.default", "empty_strided.default", "new_empty.default", "new_empty_strided.default", "resize.default",
    "set_data.default", "rand.default", "randn.default", "bernoulli.default", "multinomial.default",
    "dropout_.default", "nonzero.default", "masked_select.default", "unique_dim.default", "repeat_interleave.Tensor",
    "embedding_bag.default", "_embedding_bag.default", "_local_scalar_dense.default", "_cudnn_rnn.default",
    "from_file.default", "quantize_per_tensor.default", "sparse_coo_tensor.size", "_nested_view_from_buffer.default",
    "_unsafe_index.Tensor", "_fused_moving_avg_obs_fq_helper.default", "_test_check_tensor.default",
    "_pin_memory.default", "resolve_conj.default",
]  # fmt: skip

# what `python -m benchmarks captures` found in 173 guides, and in what becomes of them
CAPTURED = [
    "__and__.Tensor", "_to_copy", "_unsafe_view", "_weight_norm", "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "add.Tensor", "addmm", "arange", "arange.start", "arange.start_step", "argmax", "avg_pool1d", "avg_pool2d",
    "baddbmm", "batch_norm", "bitwise_not", "bmm", "cat", "chunk", "clamp", "clamp_min", "clone", "contiguous",
    "conv1d", "conv2d", "conv2d.padding", "copy", "cos", "cumsum", "detach", "diff", "div.Tensor", "einsum",
    "embedding", "eq.Scalar", "eq.Tensor", "erf", "exp", "expand", "expand_as", "expm1", "eye", "fft_fft", "fft_fftn",
    "flatten.using_ints", "floor_divide", "full", "full_like", "gather", "ge.Scalar", "ge.Tensor", "gelu",
    "group_norm", "gru.input", "gt.Scalar", "gt.Tensor", "hardtanh", "im2col", "index.Tensor", "index_put",
    "index_select", "item", "layer_norm", "le.Scalar", "le.Tensor", "linalg_vector_norm", "linear", "log",
    "logical_not", "lstm.input", "lt.Scalar", "masked_fill.Scalar", "matmul", "max.other", "max_pool1d", "max_pool2d",
    "maximum", "mean.dim", "min.other", "mul.Tensor", "multiply.Tensor", "ne.Scalar", "neg", "new_ones", "new_zeros",
    "numpy_T", "ones", "ones_like", "operator.add", "operator.floordiv", "operator.getitem", "operator.mod",
    "operator.mul", "operator.neg", "operator.sub", "pad", "permute", "polar", "pow.Scalar", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "real", "reciprocal", "relu", "remainder.Scalar", "repeat", "repeat_interleave.self_int",
    "reshape", "reshape_as", "rnn_tanh.input", "roll", "rsqrt", "rsub.Scalar", "scalar_tensor",
    "scaled_dot_product_attention", "select.int", "select_scatter", "sigmoid", "silu", "sin", "slice.Tensor",
    "slice_scatter", "softmax.int", "softplus", "sort", "split.Tensor", "split_with_sizes", "sqrt", "square",
    "squeeze.dim", "stack", "sub.Tensor", "sum.dim_IntList", "sym_size.int", "tanh", "to.device", "to.dtype", "topk",
    "torch.sym_max", "torch.sym_min", "transpose.int", "tril", "type_as", "unbind.int", "unflatten.int", "unsqueeze",
    "upsample_bicubic2d.vec", "upsample_bilinear2d.vec", "view", "view_as_complex", "view_as_real",
    "where.ScalarOther", "where.self", "zeros", "zeros_like",
]  # fmt: skip


def test_all_that_captures_of_the_guides_hold_is_there():
    names = [n if n.startswith(("operator.", "torch.")) else f"aten.{n}" for n in CAPTURED]
    assert [n for n in names if n not in operators() and f"{n}.default" not in operators()] == []


def test_a_name_stands_for_one_operator_and_an_operator_for_one_name():
    assert len(names()) == len(operators())
    assert len(OVERLOADS) > 300
    assert all(name == f"{f.namespace}.{f._opname}.{f._overloadname}" for name, f in OVERLOADS.items())
    assert {f.namespace for f in OVERLOADS.values()} == {"aten", "thesean"}


@pytest.mark.parametrize("name", [*UNSAFE, "set_grad_enabled.default", "add_.Tensor", "add.out"])
def test_what_is_not_known_to_be_safe_is_not_there(name):
    assert f"aten.{name}" not in operators()


def test_no_operator_writes_or_takes_strides_offsets_storage_names_generators_or_text_that_is_not_told():
    for name, function in OVERLOADS.items():
        schema = function._schema
        assert not schema.is_mutable, name
        taken = {a.name for a in schema.arguments}
        assert not taken & {"storage_offset", "generator", "names", "out", "strides", "filename"}, name
        assert not ("size" in taken and "stride" in taken), name
        for argument in schema.arguments:
            if "str" in str(argument.type):
                given: dict[str, Any] = {a.name: None for a in schema.arguments}
                with pytest.raises(ArtifactError):
                    check_values(name, (), {**given, argument.name: "/etc/passwd"})


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("aten.dropout.default", (None, 0.1, True), {}),  # draws random numbers: a state of the process
        ("aten.scaled_dot_product_attention.default", (None, None, None, None, 0.5), {}),
        ("aten.batch_norm.default", (None, None, None, 1, 1, True, 0.1, 1e-5, True), {}),  # writes running means
        ("aten.instance_norm.default", (None, None, None, 1, None, True, 0.1, 1e-5, True), {}),
        ("aten.instance_norm.default", (None, None, None, None, None, False, 0.1, 1e-5, True), {}),
        ("aten.lstm.input", (None, [], [], True, 1, 0.0, True, False, True), {}),
        ("aten.one_hot.default", (None,), {}),  # as many as the largest value says
        ("aten.one_hot.default", (None, -1), {}),
        ("aten.upsample_nearest2d.default", (None, [4, 4], 1e-300, 1.0), {}),
        ("aten.upsample_nearest2d.vec", (None, None, [2.0, float("nan")]), {}),
        ("aten.upsample_nearest2d.default", (None, [4, 4], "x", 1.0), {}),
        ("aten.upsample_nearest2d.vec", (None, None, "x"), {}),
        ("aten.einsum.default", (None, []), {}),
        ("aten.one_hot.default", (None, 2.0), {}),
        ("aten.ones.default", ([-(2**63) - 1],), {}),
        ("aten.ones.default", ([2],), {"device": torch.device("cuda")}),
        ("aten.ones.default", ([2],), {"pin_memory": True}),
        ("aten.ones.default", ([2**63],), {}),
        ("aten.ones.default", (2,), {"surprise": 1}),
        ("aten.ones.default", ([2], 1), {}),
        ("aten.ones.default", (), {}),
        ("aten.add.Tensor", (None, None), {"other": None}),
        ("aten.add.Tensor", ("a", "b"), {}),
        ("aten.gelu.default", (None,), {"approximate": "fast"}),
        ("aten.einsum.default", ("a;import os", []), {}),
        ("operator.add", (1,), {"b": 2}),
    ],
)
def test_arguments_out_of_their_range_are_refused(name, args, kwargs):
    with pytest.raises(ArtifactError):
        check_values(name, args, kwargs)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.upsample_nearest2d.default", (None, [4, 4])),
        ("aten.upsample_nearest2d.default", (None, [4, 4], 2.0, 2)),
        ("aten.upsample_nearest2d.vec", (None, None, [2.0, 2.0])),
        ("aten.upsample_nearest2d.vec", (None, [4, 4], None)),
        ("aten.einsum.default", ("bi,oi->bo", [])),
        ("aten.one_hot.default", (None, 5)),
        ("aten.ones.default", ([-(2**63)],)),
        ("aten.ones.default", ([2**63 - 1],)),
    ],
)
def test_arguments_within_their_range_pass(name, args):
    check_values(name, args, {})


def test_an_operator_that_torch_has_no_more_is_unknown(monkeypatch: pytest.MonkeyPatch):
    from thesean.passes.graph import operators as listed

    monkeypatch.setattr(listed, "_ATEN", "# a comment\nadd.Tensor nothing_of_the_kind add.of_no_kind")
    own = {f"thesean.{name}.default" for name in ("gated_delta_rule", "state_space", "selective_scan")}
    assert set(listed.operators.__wrapped__()) == {"aten.add.Tensor", *own, *listed._PYTHON}


def test_what_is_computed_may_not_choose_a_mode():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.gelu.default, (x,), {"approximate": x}))
    with pytest.raises(ArtifactError, match="approximate"):
        load(dump(graph))


@pytest.mark.parametrize("name", sorted(OVERLOADS))
def test_no_whole_number_stands_for_a_dtype_a_layout_a_memory_format_or_a_device(name):
    """torch takes one, and of 64 reads what lies behind its table of dtypes: a process died of it in a million runs."""
    graph, right = fx.Graph(), {"dtype": torch.float32, "device": torch.device("cpu")}
    schema = OVERLOADS[name]._schema.arguments
    needed = {a.name: right.get(a.name, graph.placeholder(a.name)) for a in schema if not a.has_default_value()}
    for argument in schema:
        if not any(kind in str(argument.real_type) for kind in ("ScalarType", "Layout", "MemoryFormat", "Device")):
            continue
        for wrong in (64, -1, 5, True, graph.placeholder("size")):
            with pytest.raises(ArtifactError, match=f"expected a .* as {argument.name}, found"):
                check_values(name, (), needed | {argument.name: wrong})
