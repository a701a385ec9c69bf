"""Graph module -> ONNX model in memory: torch's exporter, with our names for inputs, outputs and dimensions.

B batch, T time
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import Dim

from thesean.deploy.decomposing import decomposed_where_needed
from thesean.deploy.lowering.lean.leaner import leaner
from thesean.deploy.lowering.linear_products import linear_products
from thesean.deploy.lowering.lower import lower_cells, lower_portably
from thesean.deploy.lowering.lowered import file_of, form_of, operations
from thesean.deploy.lowering.whole_spectra import whole_spectra
from thesean.deploy.promoting import promoted_by_value
from thesean.deploy.rewriting import rules_by_operator
from thesean.deploy.torchlib import table_kept
from thesean.errors import ExportError, TheseanError, first_line
from thesean.passes.graph.lean_trace import lean_trace
from thesean.passes.graph.signature import InputSpec
from thesean.passes.thread_state import STATE_OUT

if TYPE_CHECKING:
    import onnx_ir as ir

# What the operators of every target need at most; onnxruntime 1.32 runs it.
FIRST_OPSET, DEFAULT_OPSET = 18, 20

# Where the exporter says which modules a node is in, and what it says of one that a pass made.
_SCOPES, _NO_MODULE = "pkg.torch.onnx.name_scopes", "_empty_nn_module_stack_from_metadata_hook"

_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


def parse_opset(opset: int | None) -> int:
    """The default for None. Raises ExportError for none that can be written: torch's own table of forms begins at 18,
    and the installed onnx knows no later one than its last.
    """
    from onnx.defs import onnx_opset_version

    if opset is None:
        return DEFAULT_OPSET
    latest = onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not FIRST_OPSET <= opset <= latest:
        raise ExportError(f"opset: expected a whole number from {FIRST_OPSET} to {latest}, found {opset!r}.")
    return opset


def output_names(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """The guide's own output keys, nested ones joined by "."; "output" or "output_0", "output_1"... without keys."""
    names = list(_names(graph_module.graph.output_node().args[0], ""))
    taken = {str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")}
    names = [f"output.{n}" if n.startswith(STATE_OUT) else n for n in names]  # a file's states are called so
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
    portable: bool = False,
) -> ir.Model:
    """The ONNX model of a graph that `for_export` made ready. Raises ExportError when the exporter can't write it.

    The dimensions that `inputs` name are dynamic and keep their names; `example` has 2 or more in each. Nodes are named
    by the module that they come from. Weights are those of the graph module, not copies. `portable`: operators of ONNX
    itself alone, and no functions.
    """
    shapes = tuple({d: Dim.DYNAMIC for d, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)
    used = operations(graph_module)
    try:
        lowered = (lower_portably if portable else lower_cells)(graph_module, opset=opset)
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
    model = program.model
    found = model.opset_imports[""]
    if found != opset:
        raise ExportError(f"expected opset {opset}, but the exporter could only write {found}. Ask for opset={found}.")
    for form in map(form_of, used):
        if form is not None and hasattr(form, "define"):
            form.define(model)
    _name_dims(model, inputs)
    if portable:
        linear_products(model, portable=True)
        _inline(model)
    whole_spectra(model)
    leaner(model, portable)
    _name_nodes(model)
    _drop_traces(model)
    return model


def _inline(model: ir.Model) -> None:
    """Bodies in place of calls. Raises ExportError for what is left of others' operators."""
    from onnx_ir.passes.common import InlinePass, RemoveUnusedOpsetsPass

    InlinePass()(model)
    RemoveUnusedOpsetsPass()(model)
    if foreign := sorted({f"{n.domain}::{n.op_type}" for n in model.graph.all_nodes() if n.domain}):
        raise ExportError(f"expected operators of ONNX itself for runtime='portable', found {', '.join(foreign)}.")


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


def _name_dims(model: ir.Model, inputs: Sequence[InputSpec]) -> None:
    """Replace the exporter's symbols (s70) by the signature's names (time), in expressions too."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for dim, size in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(size, str) and isinstance(dim, ir.SymbolicDim) and dim.value:
                names[dim.value] = size
    if not names:
        return
    # what is left of a view that flattens batch and time and another that takes them apart
    quotient = re.compile(r"\(\((?:(\w+)\*(\w+))\)//(\w+)\)")
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dim, int) or not dim.value:
            return dim
        named = pattern.sub(lambda match: names[match.group()], dim.value)
        return ir.SymbolicDim(quotient.sub(_divided, named))

    for value in _values(model):
        if value.shape is not None:  # a new one: those of some passes are frozen, and two values may share one
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _name_nodes(model: ir.Model) -> None:
    """/transformer/h/0/ln_1/LayerNormalization: what viewers fold, and profilers add up."""
    taken: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1]  # the last is the operator's own
        module = scopes[-1] if scopes and scopes[-1] != _NO_MODULE else ""
        name = "/".join(["", *(module.split(".") if module else ()), node.op_type])
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def _drop_traces(model: ir.Model) -> None:
    """Delete the exporter's notes on nodes and values: stack traces with this machine's paths, half of a small file."""
    everything: list[Any] = [*model.graphs(), *model.functions.values()]
    for graph in everything:
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
        for value in (*graph.inputs, *(o for node in graph for o in node.outputs)):
            value.metadata_props.clear()
    for graph in model.graphs():
        for value in graph.initializers.values():
            value.metadata_props.clear()
            if value.const_value is not None:
                value.const_value.metadata_props.clear()


def _divided(match: re.Match[str]) -> str:
    """((a*b)//a) -> b."""
    a, b, divisor = match.groups()
    return {a: b, b: a}.get(divisor, match.group())


def _cause(error: BaseException) -> str:
    """The innermost reason: the exporter wraps it in advice that doesn't concern the caller."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
