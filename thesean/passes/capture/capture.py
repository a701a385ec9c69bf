"""Guide -> FX graph: `torch.export` with dynamic batch and sequence, then a plain, readable GraphModule.

The graph's placeholders carry the guide's input names and its output node holds the guide's own nesting, so the
module is called as the guide is. Parameters are shared with the guide; copy before training.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from thesean.errors import CaptureError, DataError
from thesean.passes.base import run_passes
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.convention import check_same, plain_calling_convention, same_outputs, void
from thesean.passes.capture.dynamic import Dynamic, at_least_two, check_dynamic, guess_dynamic
from thesean.passes.capture.explain import explained, short, where_of
from thesean.passes.capture.fixed import fixed_lengths
from thesean.passes.capture.gradients import keep_training
from thesean.passes.capture.inputs import check_guide, forward_parameters, named_inputs, own_parameters, unwrapped
from thesean.passes.capture.precision import told_precision
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.capture.read_signature import read_signature
from thesean.passes.functionalise import Functionalise, writes
from thesean.passes.graph.dump import dump
from thesean.passes.graph.lean_trace import lean_trace
from thesean.passes.graph.modes import KeptBuffers, configured, evaluating
from thesean.passes.graph.nodes import mark_constants
from thesean.passes.graph.opaque_cells import OpaqueCells
from thesean.passes.inline_regions import InlineRegions
from thesean.passes.simplify import Simplify
from thesean.passes.split_layers import SplitLayers

logger = logging.getLogger(__name__)

# What makes a traced graph one that the rest of Thesean reads, in this order.
CANONICAL = (InlineRegions(), SplitLayers(), Functionalise(), Simplify())

# Serving flags of Hugging Face's forward: a key-value cache has no place in a converted model.
_SWITCHED_OFF = ("use_cache",)


def capture(model: nn.Module, example_inputs: Any, dynamic: Dynamic | None = None) -> Captured:
    """Trace `model` in eval mode; the model's flags, its buffers and the inputs are left as they were.

    `example_inputs` is a tensor, a tuple (positional) or a dict (by name) of tensors. Batch and sequence become
    dynamic where the model allows it, or just the dimensions of `dynamic`, {"x": {0: "batch", 1: "time"}}. Raises
    CaptureError, naming the line of the user's code, when the model can't be traced, and DataError for inputs that it
    does not take.
    """
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    check_guide(model)
    given = named_inputs(model, example_inputs)
    free: Dynamic = guess_dynamic(given, sequence=True) if dynamic is None else check_dynamic(dynamic, given)
    accepted = forward_parameters(model)
    constants = {k: False for k in _SWITCHED_OFF if k in accepted}
    with evaluating(model) as buffers, configured(model, dict.fromkeys(_SWITCHED_OFF, False)), torch.no_grad():

        def guide(inputs: dict[str, torch.Tensor]) -> Any:
            return model(**own_copies(inputs), **constants)

        inputs, eager, free = _first_run(model, given, constants, buffers, free, guessed=dynamic is None)
        if dynamic is not None:
            captured = _captured(model, inputs, constants, eager, [free])
        else:
            less = guess_dynamic(inputs, sequence=False)
            captured = _captured(model, inputs, constants, eager, [free, less] if free != less else [less])
            if not _runs_elsewhere(captured):
                captured = _captured(model, inputs, constants, eager, [less])
            captured = replace(captured, notes=fixed_lengths(captured, guide))
        del eager  # it may be as large as the guide
        captured = keep_training(captured, guide)
        check_same(captured, guide)
    return replace(captured, notes=(*captured.notes, *told_precision(captured.graph_module)))


def _first_run(
    model: nn.Module,
    given: dict[str, torch.Tensor],
    constants: dict[str, Any],
    buffers: KeptBuffers,
    free: Dynamic,
    guessed: bool,
) -> tuple[dict[str, torch.Tensor], Any, Dynamic]:
    """The inputs to trace with, the guide's output on them, and what is free. What was guessed to be a sequence of one
    step may be the one channel of a signal, and can't be doubled.
    """
    tries = [free, guess_dynamic(given, sequence=False)] if guessed else [free]
    for last, attempt in zip((len(tries) == 1, True), tries, strict=False):
        inputs = {k: at_least_two(v.clone(), attempt[k]) for k, v in given.items()}
        try:
            return inputs, _run(model, inputs, constants, buffers), attempt
        except DataError:
            if last or all(torch.Size(v.shape[1:]) == given[k].shape[1:] for k, v in inputs.items()):
                raise
    raise AssertionError  # the last try returns or raises


def _run(model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], before: KeptBuffers) -> Any:
    """The guide's output. Raises CaptureError where it depends on the calls before, through buffers that it writes."""
    try:
        eager = model(**own_copies(inputs), **constants)
    except Exception as error:
        raise DataError(f"the guide does not run on the example inputs{where_of(error)}: {short(error)}") from error
    if void(eager):
        raise DataError(
            "the guide's outputs on the example inputs hold no finite number: nothing can be compared with them. Check "
            "the weights, and give data= or example_inputs= that the guide was trained for."
        )
    if changed := before.changed():
        again = model(**own_copies(inputs), **constants)
        before.restore()
        if not same_outputs(eager, again):
            raise CaptureError(
                f"the guide keeps a state from call to call in its buffers {', '.join(changed[:3])}"
                f"{', ...' if len(changed) > 3 else ''}: the same input gave two outputs. A graph has no memory: start "
                "every sequence inside forward (zeros), and let the converted network carry the state."
            )
    return eager


def own_copies(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For a forward that may write into what it is given: the caller's tensors are not ours to change."""
    return {name: value.clone() for name, value in inputs.items()}


def _captured(
    model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], eager: Any, tries: list[Dynamic]
) -> Captured:
    exported, free = _export(model, inputs, constants, tries)
    graph_module = _plain_graph(exported, list(inputs), eager)
    if writes(graph_module):  # into views: torch's own functionalisation follows those, and splits more operators
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|copyreg)\b")
            exported = exported.run_decompositions({})
        graph_module = _plain_graph(exported, list(inputs), eager)
    mark_constants(graph_module.graph)
    signature = read_signature(graph_module, inputs, eager, free)
    return Captured(graph_module=graph_module, signature=signature, example=inputs)


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
        logger.debug("the length is fixed: the graph does not run at another one: %s", short(error))
        return False
    return True


def _export(
    model: nn.Module, inputs: dict[str, torch.Tensor], constants: dict[str, Any], tries: list[Dynamic]
) -> tuple[torch.export.ExportedProgram, Dynamic]:
    """With the first of `tries` that the model allows, and that one."""
    failure: Exception | None = None
    traced = _with_named_inputs(model, [*inputs, *constants])
    for free in tries:
        # Dim.AUTO would specialise silently; DYNAMIC fails loudly and we retry with less
        shapes: dict[str, Any] = {k: dict.fromkeys(free[k], Dim.DYNAMIC) for k in inputs}
        shapes.update(dict.fromkeys(constants))
        given = {**own_copies(inputs), **constants}
        most = max((len(dims) for dims in free.values()), default=0)
        try:
            # with gradients, so that what the guide runs without them is a region of its own
            with warnings.catch_warnings(), OpaqueCells(), torch.enable_grad(), lean_trace(most):
                # nn.LSTM and its kin put their weights in a list of their own in forward; torch puts it back
                warnings.filterwarnings("ignore", message="(?s).*assigned during export")
                return torch.export.export(traced, (), given, dynamic_shapes=shapes, strict=False), free
        except Exception as error:
            failure = error
            logger.debug("export with %s free failed: %s", free, short(error))
    # the first failure may be a fixed length alone; the last one is what stands in the way at all
    assert failure is not None
    raise explained(failure, model, inputs, constants, tries[-1]) from failure


def _with_named_inputs(model: nn.Module, names: list[str]) -> nn.Module:
    """The model, or where it takes some inputs through **kwargs a stand-in that names them and shares all the rest.

    Until torch.export takes dynamic shapes for **kwargs: 2.13 compares them with the wrong structure.
    """
    if set(names) <= set(own_parameters(model)):
        return model
    stand_in = copy.copy(model)

    def forward(**inputs: Any) -> Any:
        return model.forward(**inputs)

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    stand_in.forward = forward
    return stand_in


def _plain_graph(exported: torch.export.ExportedProgram, names: list[str], eager: Any) -> fx.GraphModule:
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    # no pass yet: it ends the tracing, and takes the hooks of torch.export's own module off
    graph_module = plain_calling_convention(graph_module, names, eager)
    dump("capture", graph_module, "as torch.export traced it")
    return run_passes(graph_module, *CANONICAL)[0]
