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
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from thesean.errors import CaptureError, DataError
from thesean.passes.base import run_passes
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.convention import check_same, plain_calling_convention
from thesean.passes.capture.inputs import at_least_two, check_guide, dynamic_dims, forward_parameters, named_inputs
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.capture.read_signature import read_signature
from thesean.passes.functionalise import Functionalise, writes
from thesean.passes.graph.dump import dump
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import mark_constants
from thesean.passes.graph.opaque_cells import OpaqueCells
from thesean.passes.simplify import Simplify
from thesean.passes.split_layers import SplitLayers

logger = logging.getLogger(__name__)

# What makes a traced graph one that the rest of Thesean reads, in this order.
CANONICAL = (SplitLayers(), Functionalise(), Simplify())

# Serving flags of Hugging Face's forward: a key-value cache has no place in a converted model.
_SWITCHED_OFF = ("use_cache",)


def capture(model: nn.Module, example_inputs: Any) -> Captured:
    """Trace `model` in eval mode; the model's flags are restored.

    `example_inputs` is a tensor, a tuple (positional) or a dict (by name) of tensors. Batch and sequence become
    dynamic where the model allows it. Raises CaptureError, naming the line of the user's code, when the model can't
    be traced, and DataError for inputs that it does not take.
    """
    check_guide(model)
    inputs = named_inputs(model, example_inputs)
    inputs = {k: at_least_two(v) for k, v in inputs.items()}
    accepted = forward_parameters(model)
    constants = {k: False for k in _SWITCHED_OFF if k in accepted}
    with evaluating(model), torch.no_grad():
        try:
            eager = model(**inputs, **constants)
        except Exception as error:
            raise DataError(f"the guide does not run on the example inputs{_where(error)}: {_short(error)}") from error
        captured = _captured(model, inputs, constants, eager, sequence=True)
        if not _runs_elsewhere(captured):
            captured = _captured(model, inputs, constants, eager, sequence=False)
    check_same(captured, eager)
    return captured


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
    return Captured(graph_module=graph_module, signature=read_signature(graph_module, inputs, eager), example=inputs)


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


def _export(
    model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], sequence: bool
) -> torch.export.ExportedProgram:
    """With a dynamic batch and, where `sequence` asks for it and the model allows it, a dynamic length."""
    failure: Exception | None = None
    traced = _with_named_inputs(model, [*inputs, *constants])
    for dynamic in (True, False) if sequence else (False,):
        # Dim.AUTO would specialise silently; DYNAMIC fails loudly and we retry with less
        shapes: dict[str, Any] = {k: dict.fromkeys(dynamic_dims(v, dynamic), Dim.DYNAMIC) for k, v in inputs.items()}
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
    if set(names) <= set(forward_parameters(model)):
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
    here = str(Path(__file__).resolve().parents[2])
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
    # no pass yet: it ends the tracing, and takes the hooks of torch.export's own module off
    graph_module = plain_calling_convention(graph_module, names, eager)
    dump("capture", graph_module, "as torch.export traced it")
    return run_passes(graph_module, *CANONICAL)[0]
