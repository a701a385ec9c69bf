"""What each part of a plan takes by itself in onnxruntime, and what its replacement takes.

B batch, T time
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx

from thesean.deploy.export_passes import for_export
from thesean.deploy.lowering.choose_operators import choose_operators
from thesean.deploy.lowering.to_onnx import DEFAULT_OPSET, to_onnx
from thesean.deploy.onnx_file import Draft
from thesean.deploy.parity import CheckSizes
from thesean.deploy.session import Session
from thesean.deploy.timing.latency import Timing, measure
from thesean.errors import DataError, ExportError, PassRefused
from thesean.passes.analyse.fingerprint import fingerprint
from thesean.passes.base import run_passes
from thesean.passes.cast_floats import CastFloats, cast_signature, cast_tensor, dtypes_for
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.extract import Extract, extract
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.bind import BoundPart, BoundPlan
from thesean.passes.plan.hybrid import Hybrid

logger = logging.getLogger(__name__)

_Key = TypeVar("_Key", bound=Hashable)

_REPEATS, _SECONDS, _LEAST = 15, 0.3, 5  # seconds a call

# Exported at sizes of which none is 1 or equal to another, so that none is taken for a constant
_BATCH, _LENGTH = 2, 7


@dataclass(frozen=True, kw_only=True)
class PartTiming:
    """A part before and after its replacement, with whatever of it stays; None where it could not be measured."""

    before: Timing | None = None
    after: Timing | None = None


def latency_of_parts(
    bound_plan: BoundPlan, hybrid: Hybrid | None, sizes: CheckSizes
) -> tuple[dict[str, PartTiming], list[str]]:
    """Latencies by the parts' paths, medians of runs in turns on one thread, and a note for each that has none.

    Parts of the same operators, shapes, wiring and target are measured once. `hybrid` is the untrained plan, None to
    measure the guide's parts alone.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    cuts: dict[tuple[object, ...], list[tuple[str, Callable[[], Extract]]]] = {}
    for part in bound_plan.parts:
        key = _structure(part)
        kinds.setdefault(key, []).append(part.planned.path)
        if len(kinds[key]) == 1:
            cuts[key] = _cuts(bound_plan, part, hybrid)
    every = {(key, which): cut for key, wanted in cuts.items() for which, cut in wanted}
    by_cut, refused = time_cuts(every, bound_plan.captured.signature, sizes)
    notes = [
        f"{kinds[key][0]}: the part {which} could not be measured by itself: {error}"
        for (key, which), error in refused.items()
    ]
    for paths in kinds.values():
        logger.info("measured alone: %s%s", paths[0], _others(len(paths) - 1))
    return {
        path: PartTiming(before=by_cut.get((key, "before")), after=by_cut.get((key, "after")))
        for key, paths in kinds.items()
        for path in paths
    }, notes


def time_cuts(
    cuts: Mapping[_Key, Callable[[], Extract]], guide: Signature, sizes: CheckSizes, settle: float | None = None
) -> tuple[dict[_Key, Timing], dict[_Key, Exception]]:
    """Stretches of networks on random hidden states, in turns on one thread, and why others could not be timed.

    `guide` is the signature of the whole network; `settle` as in `measure`.
    """
    calls: dict[_Key, Callable[[], Any]] = {}
    refused: dict[_Key, Exception] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, (key, cut) in enumerate(cuts.items()):
            try:
                calls[key] = _call(cut(), guide, sizes, Path(folder) / f"{number}.onnx")
            except (DataError, ExportError, PassRefused) as error:
                refused[key] = error
        numbered = {str(i): call for i, call in enumerate(calls.values())}
        found = measure(numbered, _REPEATS, _SECONDS * len(calls), _LEAST, settle)
    return dict(zip(calls, found.values(), strict=True)), refused


def _structure(part: BoundPart) -> tuple[object, ...]:
    """Equal for parts that take equally long, before and after."""
    sites = tuple((fingerprint(s.region), str(s.target)) for s in part.sites)
    return (fingerprint(part.region), str(part.target), sites)


def _cuts(bound_plan: BoundPlan, part: BoundPart, hybrid: Hybrid | None) -> list[tuple[str, Callable[[], Extract]]]:
    guide = bound_plan.captured.graph_module
    cuts = [("before", lambda: cut_out(part, guide))]
    if hybrid is not None and part.target is not None:
        cuts.append(("after", lambda: cut_replaced(part, hybrid)))
    return cuts


def cut_out(part: BoundPart, guide: fx.GraphModule) -> Extract:
    """The guide's part by itself. Raises PassRefused."""
    return extract(guide, part.region.entry, part.region.exit)


def cut_replaced(part: BoundPart, hybrid: Hybrid) -> Extract:
    """What a replaced part became, with whatever of it stays. Raises PassRefused."""
    return extract(hybrid.graph_module, *_ends(hybrid, part))


def _ends(hybrid: Hybrid, part: BoundPart) -> tuple[fx.Node, fx.Node]:
    """A replaced part's entry and exit in the hybrid."""
    nodes = {n.name: n for n in hybrid.graph_module.graph.nodes}
    index = hybrid.parts.index(part.planned.path)
    became = {r.guide_exit: r.exit for r in hybrid.replacements} | {g: h for h, g in hybrid.boundaries}
    entry = became.get(part.region.entry.name, part.region.entry.name)
    if entry not in nodes:  # the norm before a branch went with the branch
        entry = hybrid.of_part(index)[0].entry
    return nodes[entry], nodes[hybrid.boundaries[index][0]]


def _call(cut: Extract, guide: Signature, sizes: CheckSizes, path: Path) -> Callable[[], Any]:
    """The part in onnxruntime on random hidden states."""
    length = sizes.length if sizes.length is None or sizes.length > _BATCH else _LENGTH
    dtypes = dtypes_for(cut.graph_module, cut.signature, None)
    signature = cast_signature(cut.signature, dtypes)

    def inputs(sizes: CheckSizes) -> dict[str, torch.Tensor]:
        return {name: cast_tensor(value, dtypes) for name, value in cut.inputs(guide, sizes.of(guide)).items()}

    example = inputs(CheckSizes(batch=_BATCH, length=length))
    # the whole network's masks are sides here, with the values that they have there
    trusted = frozenset(f"side_{i}" for i in range(len(cut.sides)))
    passes = for_export(signature, (example,), stateful=False, trusted=trusted)
    module, _ = run_passes(cut.graph_module, FreezeOnCpu(), CastFloats(dtypes), *passes)
    model = to_onnx(module, example, signature.inputs, ("output",), DEFAULT_OPSET)
    choose_operators(model, "auto")  # as a file would be written
    Draft(path, path).write(model)
    session = Session(path, threads=1)
    feeds = {name: value.numpy() for name, value in inputs(sizes).items()}
    # an input that is not read has no place in the file
    given = {name: feeds[name] for name in session.inputs}
    session.run(given)
    return lambda: session.run(given)


def _others(count: int) -> str:
    return f" and {count} of the same structure" if count else ""
