"""Guide -> FX graph: `torch.export` with dynamic batch and sequence, then a plain, readable GraphModule.

The graph's placeholders carry the guide's input names and its output node holds the guide's own nesting, so the
module is called as the guide is. Parameters are shared with the guide; copy before training.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from thesean.errors import CaptureError, DataError
from thesean.passes.functionalise import Functionalise, writes
from thesean.passes.graph import mark_constants
from thesean.passes.opaque_cells import OpaqueCells, SplitLayers
from thesean.passes.positions import table_rows
from thesean.passes.reach import reach
from thesean.passes.signature import Signature
from thesean.passes.signature_of import signature_of
from thesean.passes.simplify import Simplify

logger = logging.getLogger(__name__)

_PROBE, _LONGEST_PROBE = 11, 1025  # tokens

aten = torch.ops.aten

# Serving flags of Hugging Face's forward: a key-value cache has no place in a converted model.
_SWITCHED_OFF = ("use_cache",)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """`graph_module` shares its parameters with the guide; `example` are the inputs that it was traced with."""

    graph_module: fx.GraphModule
    signature: Signature
    example: dict[str, torch.Tensor]


def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Trace `model` in eval mode; the model's flags are restored.

    `example_inputs` is a tensor, a tuple (positional) or a dict (by name) of tensors. Batch and sequence become
    dynamic where the model allows it. Raises CaptureError, naming the line of the user's code, when the model can't
    be traced, and DataError for inputs that it does not take.
    """
    check_guide(model)
    inputs = _named_inputs(model, example_inputs)
    inputs = {k: _at_least_two(v) for k, v in inputs.items()}
    accepted = _parameters(model)
    constants = {k: False for k in _SWITCHED_OFF if k in accepted}
    with evaluating(model), torch.no_grad():
        try:
            eager = model(**inputs, **constants)
        except Exception as error:
            raise DataError(f"the guide does not run on the example inputs{_where(error)}: {_short(error)}") from error
        captured = _captured(model, inputs, constants, eager, sequence=True)
        if not _runs_elsewhere(captured):
            captured = _captured(model, inputs, constants, eager, sequence=False)
    _check_same(captured, eager)
    return captured


def probe_sizes(captured: Captured) -> dict[str, int]:
    """Small sizes for probing: a length that no static dimension has, so that dimensions can be told apart, and longer
    than the kernels reach, as far as the guide's position table allows.
    """
    static: set[int] = set()
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            static.update(int(d) for d in value.shape if not isinstance(d, torch.SymInt))
    most = min(table_rows(captured.graph_module) or _LONGEST_PROBE, _LONGEST_PROBE)
    least = min(max(_PROBE, reach(captured.graph_module.graph) + 2), most)
    # odd ones first: a length that is twice a width is told apart less well
    lengths = [*range(least | 1, most + 1, 2), *range(least, 1, -1)]
    length = next((n for n in lengths if n not in static), least)
    return {name: 2 if name.startswith("batch") else length for name in captured.signature.symbols}


def _captured(
    model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], eager: Any, sequence: bool
) -> Captured:
    exported = _export(model, inputs, constants, sequence)
    graph_module = _plain_graph(exported, list(inputs), eager)
    if writes(graph_module):  # into views: torch's own functionalisation follows those, and splits more operators
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|copyreg)\b")
            exported = exported.run_decompositions({})
        graph_module = _plain_graph(exported, list(inputs), eager)
    mark_constants(graph_module.graph)
    return Captured(graph_module=graph_module, signature=signature_of(graph_module, inputs, eager), example=inputs)


def _runs_elsewhere(captured: Captured) -> bool:
    """Whether the graph runs at another length. A table of positions over windows of the input allows export a few
    lengths beside the traced one, and it takes that for a dynamic dimension.
    """
    if all(s.startswith("batch") for s in captured.signature.symbols):
        return True
    device = str(next(iter(captured.example.values())).device)
    try:
        captured.graph_module(**captured.signature.random_inputs(probe_sizes(captured), device=device))
    except Exception as error:
        logger.debug("the length is fixed: the graph does not run at another one: %s", _short(error))
        return False
    return True


def check_guide(model: nn.Module) -> None:
    """Raises DataError unless all parameters are float32 and on one device."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module as guide, found {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the guide is a TorchScript module, which can't be traced. Give the module it was made from."
        )
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if floats - {torch.float32}:
        found = ", ".join(sorted(str(d) for d in floats))
        raise DataError(f"the guide's parameters are {found}; expected torch.float32. Call model.float() first.")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise DataError(f"the guide is spread over {sorted(map(str, devices))}; expected one device.")
    if devices and next(iter(devices)).type == "meta":
        raise DataError("the guide's parameters are on the meta device and hold no values. Load its weights first.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own flag, and buffers as they were where a forward writes to them."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def _named_inputs(model: nn.Module, example: Any) -> dict[str, torch.Tensor]:
    if example is None:
        raise DataError(
            "no example inputs: the guide has no dummy_inputs and no data was given. Pass example_inputs=(x,) or data=."
        )
    accepted = _parameters(model)
    names = [k for k, p in accepted.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        unknown = [k for k in example if k not in accepted and not open_ended]
        if unknown:
            raise DataError(f"the guide's forward takes no input {unknown[0]!r}; it takes: {', '.join(accepted)}.")
        # the order of forward(), so that positional calls mean the same thing afterwards
        order = [k for k in accepted if k in example] + [k for k in example if k not in accepted]
        named = {k: example[k] for k in order}
    else:
        if not isinstance(example, (tuple, list)):
            raise DataError(f"example inputs: expected a tensor, a tuple or a dict, found {type(example).__name__}.")
        if len(example) > len(names):
            raise DataError(f"the guide's forward takes {len(names)} inputs, the example has {len(example)}.")
        named = dict(zip(names, example, strict=False))
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(f"example input {name!r}: expected a tensor, found {type(value).__name__}.")
    if not named:
        raise DataError("the example inputs are empty.")
    device = next((p.device for p in model.parameters()), None)
    for name, value in named.items():
        if device is not None and value.device != device:
            raise DataError(f"input {name!r} is on {value.device}, the guide on {device}. Move one of them.")
    return named


def _at_least_two(value: torch.Tensor) -> torch.Tensor:
    """Sizes 0 and 1 specialise at export, so a batch (and a sequence) of one is doubled."""
    if value.ndim and value.shape[0] == 1:
        value = value.repeat(2, *[1] * (value.ndim - 1))
    if 1 in _dynamic_dims(value, sequence=True) and value.shape[1] == 1:
        value = value.repeat(1, 2, *[1] * (value.ndim - 2))
    return value


def _dynamic_dims(value: torch.Tensor, sequence: bool) -> tuple[int, ...]:
    """Batch first; the second dimension of (B, T) integers and (B, T, D) floats may be a sequence."""
    if value.ndim == 0:
        return ()
    looks_like_sequence = value.ndim == 3 if value.is_floating_point() else value.ndim == 2
    return (0, 1) if sequence and looks_like_sequence else (0,)


def _export(
    model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], sequence: bool
) -> torch.export.ExportedProgram:
    """With a dynamic batch and, where `sequence` asks for it and the model allows it, a dynamic length."""
    failure: Exception | None = None
    traced = _with_named_inputs(model, [*inputs, *constants])
    for dynamic in (True, False) if sequence else (False,):
        # Dim.AUTO would specialise silently; DYNAMIC fails loudly and we retry with less
        shapes: dict[str, Any] = {k: dict.fromkeys(_dynamic_dims(v, dynamic), Dim.DYNAMIC) for k, v in inputs.items()}
        shapes.update(dict.fromkeys(constants))
        try:
            with warnings.catch_warnings(), OpaqueCells():
                # nn.LSTM and its kin put their weights in a list of their own in forward; torch puts it back
                warnings.filterwarnings("ignore", message="(?s).*assigned during export")
                return torch.export.export(traced, (), {**inputs, **constants}, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            failure = error
            logger.debug("export with dynamic sequence=%s failed: %s", dynamic, _short(error))
    # the first failure may be a fixed length alone; the last one is what stands in the way at all
    assert failure is not None
    raise CaptureError(
        f"the guide can't be captured{_where(failure)}: {_short(failure)}. Control flow that depends on values can't "
        "become a graph: convert a submodule instead, or replace the branch by torch.where."
    ) from failure


def _with_named_inputs(model: nn.Module, names: list[str]) -> nn.Module:
    """The model, or where it takes some inputs through **kwargs a stand-in that names them and shares all the rest.

    Until torch.export takes dynamic shapes for **kwargs: 2.13 compares them with the wrong structure.
    """
    if set(names) <= set(_parameters(model)):
        return model
    stand_in = copy.copy(model)

    def forward(**inputs: Any) -> Any:
        return model.forward(**inputs)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    stand_in.forward = forward
    return stand_in


def _where(error: BaseException) -> str:
    """` at file.py, line 12, in forward: if h.sum() > 0:`, the innermost frame outside of torch and Thesean."""
    here = str(Path(__file__).resolve().parents[1])
    torch_home = str(Path(torch.__file__).resolve().parent)
    seen: BaseException | None = error
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            if not frame.filename.startswith((here, torch_home, "<")) and "contextlib" not in frame.filename:
                return f" at {frame.filename}, line {frame.lineno}, in {frame.name}: {(frame.line or '').strip()}"
        seen = seen.__cause__ or seen.__context__
    return ""


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(".")


def _plain_graph(exported: torch.export.ExportedProgram, names: list[str], eager: Any) -> fx.GraphModule:
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    graph_module = _plain_calling_convention(graph_module, names, eager)
    for canonical in (SplitLayers(), Functionalise(), Simplify()):
        graph_module = canonical(graph_module).graph_module
    return graph_module


def _plain_calling_convention(graph_module: fx.GraphModule, names: list[str], eager: Any) -> fx.GraphModule:
    """Replace export's pytree calling convention by placeholders in order and a nested output node."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in names and str(node.target) not in names:
            if node.users:
                raise CaptureError(f"input {node.name!r} of the graph is not one of the example inputs {names}.")
            graph.erase_node(node)
    output = graph.output_node()
    leaves = list(pytree.tree_leaves(output.args[0]))
    structure = _nest(eager, leaves)
    if leaves:
        raise CaptureError(f"the guide's output of type {type(eager).__name__} has a structure that can't be kept.")
    output.args = (structure,)
    graph.set_codegen(fx.graph.CodeGen())
    placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    first = next(iter(graph.nodes))
    for name in names:  # forward()'s order
        node = placeholders[name]
        if node is not first:
            first.prepend(node)
    # a new module: the exported one carries hooks that check the old convention
    return fx.GraphModule(graph_module, graph)


def _nest(value: Any, leaves: list[Any]) -> Any:
    """The nesting of `value` with the graph's output nodes as leaves, consumed in order."""
    if isinstance(value, torch.Tensor):
        return leaves.pop(0)
    if value is None:
        # export keeps None among the leaves of tuples and dicts
        if leaves and leaves[0] is None:
            leaves.pop(0)
        return None
    if isinstance(value, Mapping):
        return {k: _nest(v, leaves) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return (
            type(value)(_nest(v, leaves) for v in value)
            if type(value) in (tuple, list)
            else tuple(_nest(v, leaves) for v in value)
        )
    if is_dataclass(value):
        return {f.name: _nest(getattr(value, f.name), leaves) for f in fields(value)}
    raise CaptureError(
        f"the guide returns a {type(value).__name__}; expected tensors in tuples, lists, dicts or dataclasses."
    )


@torch.no_grad()
def _check_same(captured: Captured, eager: Any) -> None:
    """The graph must compute what the guide computes: anything else is a capture that went wrong silently."""
    graph_out = pytree.tree_leaves(captured.graph_module(**captured.example))
    leaves: list[Any] = []
    _collect(eager, leaves)
    got = [v for v in graph_out if isinstance(v, torch.Tensor)]
    for index, (a, b) in enumerate(zip(got, leaves, strict=True)):
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            error = (a - b).abs().max().item()
            raise CaptureError(
                f"the captured graph disagrees with the guide by {error:.1e} in output {index}; is the guide random "
                "in eval mode?"
            )


def _collect(value: Any, leaves: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
    elif isinstance(value, Mapping):
        for v in value.values():
            _collect(v, leaves)
    elif isinstance(value, (tuple, list)):
        for v in value:
            _collect(v, leaves)
    elif is_dataclass(value):
        for f in fields(value):
            _collect(getattr(value, f.name), leaves)
