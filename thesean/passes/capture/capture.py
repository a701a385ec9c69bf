"""Guide -> FX graph: `torch.export` with dynamic batch and sequence, then a plain, readable GraphModule.

The graph's placeholders carry the guide's input names and its output node holds the guide's own nesting, so the
module is called as the guide is. Parameters are shared with the guide; copy before training.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from thesean.errors import CaptureError
from thesean.passes.base import Pass, run_passes
from thesean.passes.capture.branches import Fixed, bound_sizes, columns
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.convention import check_same, first_shown, plain_calling_convention
from thesean.passes.capture.dynamic import Dynamic, check_dynamic, guess_dynamic
from thesean.passes.capture.explain import explained, fixed_sizes, short
from thesean.passes.capture.fixed import fixed_lengths
from thesean.passes.capture.gradients import keep_training
from thesean.passes.capture.guide import SWITCHED_OFF, Guide, own_copies, running
from thesean.passes.capture.hints import masks_not_looked_at
from thesean.passes.capture.inputs import check_guide, forward_parameters, named_inputs, unwrapped
from thesean.passes.capture.lengths import lengths_as_sizes
from thesean.passes.capture.longer_tables import length_guards, steady_up_to, tables_kept
from thesean.passes.capture.memories import memories_as_operators
from thesean.passes.capture.precision import told_precision
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.capture.read_signature import read_signature
from thesean.passes.capture.stand_in import as_in_the_guide, stand_in
from thesean.passes.functionalise import Functionalise
from thesean.passes.graph.dump import dump
from thesean.passes.graph.give_back import give_back
from thesean.passes.graph.guide_class import GuideClass
from thesean.passes.graph.lean_trace import lean_trace
from thesean.passes.graph.nodes import mark_constants
from thesean.passes.graph.opaque_cells import OpaqueCells
from thesean.passes.graph.signature import Origin
from thesean.passes.graph.writes import writes
from thesean.passes.inline_regions import InlineRegions
from thesean.passes.latents_side_by_side import LatentsSideBySide
from thesean.passes.rejoin_norms import RejoinNorms
from thesean.passes.simplify import Simplify
from thesean.passes.split_layers import SplitLayers
from thesean.passes.views_as_reshapes import ViewsAsReshapes
from thesean.passes.write_out_operators import WriteOutOperators
from thesean.passes.write_out_sizes import WriteOutSizes
from thesean.passes.writes_into_views import WritesIntoViews

logger = logging.getLogger(__name__)

_VMAP = "torch._functorch.predispatch"

# What makes a traced graph one that the rest of Thesean reads, in this order.
CANONICAL = (
    InlineRegions(), SplitLayers(), Functionalise(), WritesIntoViews(), ViewsAsReshapes(), WriteOutOperators(),
    WriteOutSizes(), Simplify(), LatentsSideBySide(),
)  # fmt: skip
# What comes before these where torch followed writes into views, and took operators apart.
REJOINING = (RejoinNorms(),)


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
    constants = {k: False for k in SWITCHED_OFF if k in accepted}
    with running(model, constants) as guide, torch.no_grad():
        captured = _captured_right(guide, given, free, guessed=dynamic is None)
    signature = replace(captured.signature, origin=Origin(commit=_commit(model)), guide=GuideClass.of(model))
    captured = replace(captured, signature=signature)
    return replace(captured, notes=(*guide.notes, *captured.notes, *told_precision(captured.graph_module)))


def _commit(model: nn.Module) -> str | None:
    """Of the weights, as a configuration that was loaded from a hub tells it."""
    found = getattr(getattr(model, "config", None), "_commit_hash", None)
    return found if isinstance(found, str) else None


def _captured_right(guide: Guide, given: dict[str, torch.Tensor], free: Dynamic, guessed: bool) -> Captured:
    """With the sizes free at which the graph was seen to be the guide. Raises CaptureError where that takes a dimension
    which the caller wants free.
    """
    told: list[str] = []
    fixed: set[tuple[str, int]] = set()
    while True:
        inputs, eager, free = guide.first_run(given, free, guessed)
        captured = _captured(guide, inputs, eager, free, guessed)
        shown = first_shown(captured, eager)
        del eager  # it may be as large as the guide
        give_back()
        found = (columns(captured) if guessed else None) or bound_sizes(captured, guide.afresh)
        if isinstance(found, Captured) and (outside := _outside(found, given)) is None:
            lengths = fixed_lengths(found, guide, fixed) if guessed else ()
            give_back()
            found = keep_training(replace(found, notes=(*told, *lengths, *found.notes)), guide)
            give_back()
            check_same(found, guide, shown)
            give_back()
            return found
        check_same(captured, guide, shown)
        one = found if isinstance(found, Fixed) else outside
        assert one is not None
        places = _places(captured, one.name)
        (name, dim), *_ = places
        says = f"dimension {dim} of {name} ({one.name}) at {given[name].shape[dim]}, the example's: {one.describe()}"
        if not guessed:
            raise CaptureError(f"the guide fixes {says}. Leave it out of dynamic=, or write the branch as torch.where.")
        if not one.column:
            told.append(
                f"fixed {says}. Give example inputs of the size that you need, or write the branch as torch.where."
            )
        fixed |= set(places)
        free = {k: {d: n for d, n in dims.items() if (k, d) not in fixed} for k, dims in free.items()}


def _places(captured: Captured, name: str) -> list[tuple[str, int]]:
    """Inputs and dimensions of a size, by its name."""
    return [(s.name, d) for s in captured.signature.inputs for d, size in enumerate(s.shape) if size == name]


def _outside(captured: Captured, given: dict[str, torch.Tensor]) -> Fixed | None:
    """A size of the caller's own that the bounds of the traced branch exclude: one, which was doubled to be traced."""
    for bound in captured.signature.bounds:
        for name, dim in _places(captured, bound.name):
            if not bound.holds(given[name].shape[dim]):
                return Fixed(bound.name, bound.least)
    return None


def _captured(guide: Guide, inputs: dict[str, torch.Tensor], eager: Any, free: Dynamic, guessed: bool) -> Captured:
    """Where the free dimensions were `guessed`, without those of time if the guide doesn't allow them."""
    less = {k: {d: n for d, n in dims.items() if n.startswith("batch")} for k, dims in free.items()}
    if not guessed or free == less:
        return _traced(guide, inputs, eager, [free])
    captured = _traced(guide, inputs, eager, [free, less])
    return captured if _runs_elsewhere(captured) else _traced(guide, inputs, eager, [less])


def _traced(guide: Guide, inputs: dict[str, torch.Tensor], eager: Any, tries: list[Dynamic]) -> Captured:
    steady = steady_up_to(guide.model, inputs)
    with nullcontext() if steady is None else tables_kept(guide.model):
        exported, free = _export(guide, inputs, eager, tries)
    guards = _guards_of(exported)
    graph_module = _plain_graph(exported, list(inputs), eager, CANONICAL)
    if writes(graph_module) or _maps(graph_module):
        # into views: torch's own functionalisation follows those, and writes vmap out, and splits more operators
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|copyreg)\b")
            exported = exported.run_decompositions({})
        graph_module = _plain_graph(exported, list(inputs), eager, (*REJOINING, *CANONICAL))
    mark_constants(graph_module.graph)
    signature = read_signature(graph_module, inputs, eager, free)
    if steady is not None:
        guards += length_guards(graph_module, steady)
    return Captured(graph_module=graph_module, signature=signature, example=inputs, guards=guards)


def _maps(graph_module: fx.GraphModule) -> bool:
    """Whether torch.vmap stands in the graph as the steps that it takes, which run nowhere else."""
    return any(getattr(n.target, "__module__", "") == _VMAP for n in graph_module.graph.nodes)


def _guards_of(exported: torch.export.ExportedProgram) -> tuple[Any, ...]:
    """What the trace assumed of sizes."""
    sizes = (d for n in exported.graph.find_nodes(op="placeholder") for d in getattr(n.meta.get("val"), "shape", ()))
    shape_env = next((d.node.shape_env for d in sizes if isinstance(d, torch.SymInt)), None)
    return () if shape_env is None else tuple(dict.fromkeys(guard.expr for guard in shape_env.guards))


def _runs_elsewhere(captured: Captured) -> bool:
    """Whether the graph runs at another length. A table of positions over windows of the input allows export a few
    lengths beside the traced one, and it takes that for a dynamic dimension.
    """
    if not captured.signature.lengths:
        return True
    device = str(next(iter(captured.example.values())).device)
    try:
        captured.graph_module(**captured.signature.random_inputs(probe_sizes(captured), device=device))
    except Exception as error:
        logger.debug("the length is fixed: the graph does not run at another one: %s", short(error))
        return False
    return True


def _export(
    guide: Guide, inputs: dict[str, torch.Tensor], eager: Any, tries: list[Dynamic]
) -> tuple[torch.export.ExportedProgram, Dynamic]:
    """With the first of `tries` that the model allows, and that one. Of several lengths that were guessed the model may
    fix one, as a spectrogram's bands, and leave the others free: what it was seen to fix goes before all of them do.
    """
    failure: Exception | None = None
    waiting = list(tries)
    model, constants = guide.model, guide.constants
    traced = stand_in(model, [*inputs, *constants], eager)
    while waiting:
        free = waiting.pop(0)
        # Dim.AUTO would specialise silently; DYNAMIC fails loudly and we retry with less
        shapes: dict[str, Any] = {k: dict.fromkeys(free[k], Dim.DYNAMIC) for k in inputs}
        shapes.update(dict.fromkeys(constants))
        given = {**own_copies(inputs), **constants}
        most = max((len(dims) for dims in free.values()), default=0)
        try:
            # with gradients, so that what the guide runs without them is a region of its own
            with (
                guide.forgetting(), warnings.catch_warnings(), OpaqueCells(), masks_not_looked_at(),
                memories_as_operators(model), lengths_as_sizes(model), torch.enable_grad(), lean_trace(most),
            ):  # fmt: skip
                # nn.LSTM and its kin put their weights in a list of their own in forward; torch puts it back
                warnings.filterwarnings("ignore", message="(?s).*assigned during export")
                return torch.export.export(traced, (), given, dynamic_shapes=shapes, strict=False), free
        except Exception as error:
            failure = error
            logger.debug("export with %s free failed: %s", free, short(error))
            rest = _lengths_left(free, fixed_sizes(error))
            if rest is not None and waiting and rest not in waiting:
                waiting.insert(0, rest)
    # the first failure may be a fixed length alone; the last one is what stands in the way at all
    assert failure is not None
    raise explained(failure, model, inputs, constants, tries[-1]) from failure


def _lengths_left(free: Dynamic, fixed: Sequence[tuple[str, int]]) -> Dynamic | None:
    """Without what is fixed; None where that isn't lengths alone, or nothing."""
    if not fixed or any(free.get(name, {}).get(dim, "batch").startswith("batch") for name, dim in fixed):
        return None
    return {k: {d: n for d, n in dims.items() if (k, d) not in fixed} for k, dims in free.items()}


def _plain_graph(
    exported: torch.export.ExportedProgram, names: list[str], eager: Any, passes: Sequence[Pass]
) -> fx.GraphModule:
    with warnings.catch_warnings():  # a plain tensor that is trained: `keep_training` makes a parameter of it
        warnings.filterwarnings("ignore", message="A model attribute .* requires gradient")
        graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    # no pass yet: it ends the tracing, and takes the hooks of torch.export's own module off
    as_in_the_guide(graph_module.graph)
    graph_module = plain_calling_convention(graph_module, names, eager)
    dump("capture", graph_module, "as torch.export traced it")
    return run_passes(graph_module, *passes)[0]
