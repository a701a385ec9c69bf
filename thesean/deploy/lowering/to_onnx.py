"""Graph module -> ONNX model in memory: torch's exporter, with our names for inputs, outputs and dimensions.

B batch, T time
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import Dim

from thesean.deploy.decomposing import decomposed_where_needed
from thesean.deploy.lowering.lower import lower_cells
from thesean.deploy.lowering.lowered import file_of, form_of, operations
from thesean.deploy.promoting import promoted_by_value
from thesean.deploy.rewriting import rules_by_operator
from thesean.deploy.session import first_line
from thesean.deploy.torchlib import table_kept
from thesean.errors import ExportError, TheseanError
from thesean.passes.graph.lean_trace import lean_trace
from thesean.passes.graph.signature import InputSpec

# What the operators of every target need at most; onnxruntime 1.32 runs it.
DEFAULT_OPSET = 20

_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def output_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """The guide's own output keys, nested ones joined by "."; "output" or "output_0", "output_1"... without keys."""
    names = list(_names(graph_module.graph.output_node().args[0], ""))
    taken = {str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")}
    return tuple(f"{n}_out" if n in taken else n for n in names)  # ONNX has one space of names


def _names(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, fx.Node):
        yield prefix or "output"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _names(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from _names(inner, f"{prefix}.{index}" if prefix else f"output_{index}")


def to_onnx(
    graph_module: fx.GraphModule,
    example: dict[str, torch.Tensor],
    inputs: Sequence[InputSpec],
    outputs: Sequence[str],
    opset: int,
) -> Any:
    """An ONNX ModelProto of a graph that `for_export` made ready. Raises ExportError when the exporter can't write it.

    The dimensions that `inputs` name are dynamic and keep their names; `example` has 2 or more in each.
    """
    shapes = tuple({d: Dim.DYNAMIC for d, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)
    used = operations(graph_module)
    try:
        lowered = lower_cells(graph_module, opset=opset)
        with quiet(), quick_exporter(), lean_trace(max(map(len, shapes), default=0)), torch.no_grad():
            program = torch.onnx.export(
                lowered,
                tuple(example[spec.name] for spec in inputs),
                input_names=[spec.name for spec in inputs],
                output_names=list(outputs),
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except TheseanError:
        raise
    except Exception as error:
        message = f"torch's exporter can't write this graph at opset {opset}: {_cause(error)}"
        raise ExportError(f"{message}{_missing_forms(used)}") from error
    assert program is not None
    proto = program.model_proto
    found = next(int(o.version) for o in proto.opset_import if o.domain == "")
    if found != opset:
        raise ExportError(f"expected opset {opset}, but the exporter could only write {found}. Ask for opset={found}.")
    for form in map(form_of, used):
        if form is not None and hasattr(form, "define"):
            form.define(proto)
    _name_dims(proto, inputs)
    _drop_traces(proto.graph)
    for function in proto.functions:
        _drop_traces(function)
    return proto


def _missing_forms(used: Sequence[str]) -> str:
    """The likeliest reason: a kernel that went through the exporter as torch code."""
    missing = [operation for operation in used if form_of(operation) is None]
    if not missing:
        return ""
    names, files = ", ".join(map(repr, missing)), ", ".join(map(file_of, missing))
    return f" No ONNX form is known of {names}: add {files}, which defines lower(module, path, opset)."


@contextmanager
def quick_exporter() -> Iterator[None]:
    """Exports inside write the file that they write outside, in half the time."""
    with table_kept(), decomposed_where_needed(), promoted_by_value(), rules_by_operator():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's notes on its own insides: deprecations in torch, operators it registers, versions it converts."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in _LOGGERS]
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnxscript|onnx_ir|copyreg|copy)\b")
        try:
            for logger, _ in levels:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)


def _name_dims(proto: Any, inputs: Sequence[InputSpec]) -> None:
    """Replace the exporter's symbols (s70) by the signature's names (time), in expressions too."""
    names: dict[str, str] = {}
    for value, spec in zip(proto.graph.input, inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(size, str) and dim.dim_param:
                names[dim.dim_param] = size
    if not names:
        return
    # what is left of a view that flattens batch and time and another that takes them apart
    quotient = re.compile(r"\(\((?:(\w+)\*(\w+))\)//(\w+)\)")
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                named = pattern.sub(lambda match: names[match.group()], dim.dim_param)
                dim.dim_param = quotient.sub(_divided, named)


def _drop_traces(graph: Any) -> None:
    """Delete the exporter's notes on nodes and values: stack traces with this machine's paths, half of a small file."""
    del graph.metadata_props[:]
    for name in ("input", "output", "value_info", "initializer"):
        for value in getattr(graph, name, ()):
            if not isinstance(value, str):  # a function's inputs are names alone
                del value.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _drop_traces(attribute.g)


def _divided(match: re.Match[str]) -> str:
    """((a*b)//a) -> b."""
    a, b, divisor = match.groups()
    return {a: b, b: a}.get(divisor, match.group())


def _cause(error: BaseException) -> str:
    """The innermost reason: the exporter wraps it in advice that doesn't concern the caller."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
