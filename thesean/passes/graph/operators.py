"""The operators that a saved graph may hold, and the values that their arguments may have: whatever is not here is
refused, saving and loading alike.

They are what captures of the guides in benchmarks/zoo/ and tests/guides.py hold (benchmarks/captures.py shows it),
and their nearest kin. Each returns the same for the same arguments, writes to none of them, reads nothing but them,
looks at sizes and indices before it reads by them (or `unchecked.py` does), and changes nothing of the process: no
strides, offsets or storage, no random numbers, no memory left as it was found, no sizes that depend on values.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from thesean.errors import ArtifactError
from thesean.passes.graph.opaque_memories import MEMORIES

# `name` is aten.name.default
_ATEN = """
# numbers, one tensor
abs acos acosh alias angle asin asinh atan atanh bitwise_not ceil celu clone contiguous cos cosh deg2rad detach elu erf
erfc exp exp2 expm1 floor frac gelu glu hardshrink hardsigmoid hardswish hardtanh imag isfinite isinf isnan leaky_relu
lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive rad2deg real reciprocal
relu relu6 round round.decimals rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square
tan tanh threshold trunc view_as_complex view_as_real
# numbers, two or three tensors, or a tensor and a number
__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar __xor__.Tensor add.Scalar add.Tensor addcdiv
addcmul atan2 bitwise_and.Scalar bitwise_and.Tensor bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Scalar
bitwise_xor.Tensor clamp clamp.Tensor clamp_max clamp_max.Tensor clamp_min clamp_min.Tensor complex copy
copysign.Tensor div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode divide.Scalar divide.Tensor eq.Scalar eq.Tensor
floor_divide floor_divide.Scalar fmax fmin fmod.Scalar fmod.Tensor ge.Scalar ge.Tensor greater.Scalar greater.Tensor
greater_equal.Scalar greater_equal.Tensor gt.Scalar gt.Tensor heaviside hypot le.Scalar le.Tensor lerp.Scalar
lerp.Tensor less.Scalar less.Tensor less_equal.Scalar less_equal.Tensor logaddexp logaddexp2 logical_and logical_or
logical_xor lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor max.other maximum min.other minimum mul.Scalar
mul.Tensor multiply.Scalar multiply.Tensor ne.Scalar ne.Tensor not_equal.Scalar not_equal.Tensor polar pow.Scalar
pow.Tensor_Scalar pow.Tensor_Tensor prelu remainder.Scalar remainder.Tensor rsub.Scalar rsub.Tensor sub.Scalar
sub.Tensor subtract.Scalar subtract.Tensor true_divide.Scalar true_divide.Tensor where.Scalar where.ScalarOther
where.ScalarSelf where.self xlogy.Tensor
# sums and the like over dimensions
all all.dim amax amin any any.dim argmax argmin argsort argsort.stable count_nonzero.dim_IntList cummax cummin cumprod
cumsum diff linalg_vector_norm log_softmax.int logcumsumexp logsumexp max max.dim mean mean.dim median.dim min min.dim
norm.ScalarOpt_dim prod prod.dim_int softmax.int sort sort.stable std.correction std.dim sum sum.dim_IntList topk
var.correction var.dim var_mean.correction
# shapes
_unsafe_view adjoint atleast_1d atleast_2d broadcast_tensors broadcast_to cat chunk concat concatenate diagonal expand
expand_as flatten.using_ints flip fliplr flipud hstack im2col mH mT matrix_H meshgrid meshgrid.indexing movedim.int
movedim.intlist narrow numpy_T permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave.self_int reshape
reshape_as roll rot90 select.int select_scatter slice.Tensor slice_scatter split.Tensor split_with_sizes squeeze
squeeze.dim squeeze.dims stack swapaxes swapdims sym_numel sym_size.int t tensor_split.indices tensor_split.sections
tile transpose.int tril triu unbind.int unflatten.int unfold unsafe_chunk unsafe_split.Tensor unsafe_split_with_sizes
unsqueeze view view_as vstack
# rows and entries by their indices
bucketize.Tensor embedding gather index.Tensor index_add index_copy index_fill.int_Scalar index_put index_select
one_hot scatter.src scatter.value scatter_add scatter_reduce.two take_along_dim
# new tensors, all of whose values are said
arange arange.start arange.start_step eye eye.m fill.Scalar fill.Tensor full full_like linspace new_full new_ones
new_zeros ones ones_like scalar_tensor tril_indices triu_indices zeros zeros_like
# types and devices
_to_copy item to.device to.dtype to.dtype_layout type_as
# products
addbmm addmm addmv baddbmm bilinear bmm dot einsum linear matmul mm mv outer scaled_dot_product_attention
# layers
_weight_norm adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d
avg_pool3d batch_norm constant_pad_nd conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding
conv_transpose1d conv_transpose2d.input convolution dropout group_norm instance_norm layer_norm max_pool1d max_pool2d
max_pool3d native_group_norm native_layer_norm pad reflection_pad1d reflection_pad2d replication_pad1d
replication_pad2d rms_norm upsample_bicubic2d upsample_bicubic2d.vec upsample_bilinear2d upsample_bilinear2d.vec
upsample_linear1d upsample_linear1d.vec upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d
upsample_nearest2d.vec gru.input lstm.input rnn_relu.input rnn_tanh.input
# spectra
fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn
fft_rfft fft_rfft2 fft_rfftn stft
"""

_PYTHON: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
        operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    )
} | {
    f"torch.{f.__name__}": f
    for f in (torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float)
}  # fmt: skip


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is v or (type(value) is type(v) and value == v) for v in values)


def _scale(value: Any) -> bool:
    """Beyond, torch's arithmetic on coordinates leaves what an integer holds."""
    return value is None or (isinstance(value, (int, float)) and 1 / 1024 <= value <= 1024)


# By the argument's name, whichever operator's it is. Text is told value by value: it names modes, never files.
_VALUES: dict[str, Callable[[Any], bool]] = {
    "approximate": _one_of("none", "tanh"),
    "indexing": _one_of("ij", "xy"),
    "rounding_mode": _one_of(None, "floor", "trunc"),
    "mode": _one_of("constant", "reflect", "replicate", "circular"),
    "equation": lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z,.> -]{1,200}", value) is not None,
    "reduce": _one_of("sum", "prod", "mean", "amax", "amin"),
    "norm": _one_of(None, "backward", "ortho", "forward"),
    "layout": _one_of(None, torch.strided),
    "device": _one_of(None, torch.device("cpu")),
    "pin_memory": _one_of(None, False),
    # what draws random numbers, or writes running means, in training alone
    "train": _one_of(False),
    "dropout_p": _one_of(0, 0.0),
    "sparse": _one_of(False),
    "num_classes": lambda value: isinstance(value, int) and value > 0,  # else as many as the largest value says
    "scale_factor": _scale,
    "scale_factors": lambda value: value is None or (isinstance(value, (list, tuple)) and all(map(_scale, value))),
    "scales": _scale,
    "scales_h": _scale,
    "scales_w": _scale,
}
# Of one operator alone: `padding` of a convolution is a word, of a pooling numbers.
_OWN_VALUES: dict[tuple[str, str], Callable[[Any], bool]] = {
    **{(f"aten.conv{n}d.padding", "padding"): _one_of("same", "valid") for n in (1, 2, 3)},
    # running means are written, whatever the schema says, where it takes the batch's own
    ("aten.instance_norm.default", "use_input_stats"): _one_of(True),
    ("aten.instance_norm.default", "running_mean"): _one_of(None),
    ("aten.instance_norm.default", "running_var"): _one_of(None),
}
# Of arguments together: the batch's own means, where none are kept (a convolution's standardised weights).
_TOGETHER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "aten.batch_norm.default": lambda given: (
        given["training"] is False
        or (given["training"] is True and given["running_mean"] is None and given["running_var"] is None)
    ),
}

# What torch takes a whole number for too, and looks up where numbers past the last one are other memory.
_TYPES: dict[str, type] = {
    "ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format, "Device": torch.device
}  # fmt: skip


@cache
def operators() -> dict[str, Callable[..., Any]]:
    """Every operator by its name in a file, such as `aten.addmm.default` or `operator.getitem`."""
    words = " ".join(line for line in _ATEN.splitlines() if not line.startswith("#")).split()
    names = [word if "." in word else f"{word}.default" for word in words]
    found = {f"aten.{name}": _overload(*name.split(".")) for name in names}
    # torch may rename one in a version to come: then it is unknown there
    own = {f"thesean.{operator._opname}.default": operator for operator in MEMORIES}
    return {name: overload for name, overload in found.items() if overload is not None} | own | _PYTHON


def _overload(name: str, overload: str) -> Callable[..., Any] | None:
    return getattr(getattr(torch.ops.aten, name, None), overload, None)


@cache
def names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in operators().items()}


def check_values(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ArtifactError for arguments that the operator of that name doesn't have, or may not have in a file.

    What is computed is no value here: it is a tensor or a size, which torch checks against the schema when it runs.
    """
    function = operators()[name]
    if not isinstance(function, torch._ops.OpOverload):
        if kwargs:
            raise ArtifactError(f"graph.json: {name} takes no keyword.")
        return
    schema = function._schema.arguments
    by_position = [a.name for a in schema if not a.kwarg_only]
    if len(args) > len(by_position) or not kwargs.keys() <= {a.name for a in schema} - set(by_position[: len(args)]):
        raise ArtifactError(f"graph.json: {name} doesn't take these arguments; the file was altered.")
    given = {**dict(zip(by_position, args, strict=False)), **kwargs}
    for argument in schema:
        rule = _OWN_VALUES.get((name, argument.name)) or _VALUES.get(argument.name)
        if argument.name not in given and not argument.has_default_value():
            raise ArtifactError(f"graph.json: {name} lacks its {argument.name}; the file was altered.")
        expected = _TYPES.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
        if expected and not isinstance(given.get(argument.name), (expected, type(None))):
            raise ArtifactError(
                f"graph.json: {name}: expected a {expected.__name__} as {argument.name}, found "
                f"{given[argument.name]!r:.80}; the file was altered."
            )
        value = given.setdefault(argument.name, argument.default_value)
        text = isinstance(value, str)
        if (rule is None and text) or (rule is not None and not rule(value)) or not _finite_size(value):
            raise ArtifactError(f"graph.json: {name} may not have {argument.name}={value!r:.80} in a file.")
    if not _TOGETHER.get(name, lambda given: True)(given):
        raise ArtifactError(f"graph.json: {name} may not have these arguments together in a file.")


def _finite_size(value: Any) -> bool:
    """Whether every whole number in it is one of torch's."""
    if isinstance(value, (list, tuple)):
        return all(map(_finite_size, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**63
