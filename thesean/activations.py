"""What the guide makes of the user's data, written before a run: `thesean activations`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from thesean.compiler import divided, traced
from thesean.distill.data import Batches
from thesean.distill.saved_activations import Written, write_activations
from thesean.distill.seen import Seen
from thesean.distill.task import InputsOf
from thesean.errors import DataError, PlanError
from thesean.keywords import check_keywords
from thesean.passes.graph.modes import usual_settings
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import TargetSpec
from thesean.passes.plan.partition import Granularity
from thesean.request import Request


class Division(TypedDict, total=False):
    """How the guide is read and divided, as `compile` takes it."""

    example_inputs: Any
    dynamic: Mapping[str, Mapping[int, str]] | None
    inputs: InputsOf | None
    parts: Sequence[str] | None
    keep: Sequence[str]
    granularity: Granularity | None
    merge: int | None
    target_parts: int | None


def save_activations(
    model: nn.Module,
    path: str | Path,
    target: TargetSpec = "rnn",
    *,
    data: Iterable[Any],
    **division: Unpack[Division],
) -> Written:
    """Write what the guide makes of each batch of `data`, where its parts begin and end and at its output, for
    `compile(..., cache=path)`. Batches that are there already are left, so that a folder can grow.

    target and the further arguments are those of the conversion, which decide where parts end. Raises WriteError for a
    folder that holds something else, DataError, and what `plan` raises.
    """
    check_keywords(save_activations, Division, division)
    if data is None:
        raise DataError("data: expected batches to run the guide on, found none.")
    if isinstance(target, str) and target == "auto":
        raise PlanError("target 'auto' has no parts before it has chosen: name the target, or leave it out.")
    request = Request(target=target, data=data, **division)
    with usual_settings():
        captured = traced(model, request)
        guide = captured.graph_module
        hybrid = build_hybrid(divided(captured, request), share=True)
        ends = {name for r in hybrid.replacements for name in (r.guide_entry, r.guide_exit)}
        ends |= {theirs for _, theirs in hybrid.boundaries} | set(Seen(guide).names)
        device = next(iter(captured.example.values())).device
        batches = Batches(request.data or (), captured.signature, device, request.reading)
        return write_activations(guide, ends, (inputs for _, inputs in batches), path)
