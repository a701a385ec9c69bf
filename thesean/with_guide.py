"""A saved conversion and its guide, together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from thesean.converted import Converted, Frontier
from thesean.distill.task import InputsOf
from thesean.errors import DataError
from thesean.origin import with_origin
from thesean.passes.capture.capture import capture
from thesean.passes.capture.unread import without_unread
from thesean.passes.graph.modes import usual_settings
from thesean.passes.plan.hybrid import bound_positions
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import KEEP
from thesean.report.conversion import ConversionReport
from thesean.request import Request


def with_guide(
    converted: Converted,
    model: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    inputs: InputsOf | None = None,
) -> Converted:
    """The conversion with a frontier of two: `model`, which it came from, and itself. Hybrids between are not saved.

    The other arguments are as in `compile`; without data, the model's `dummy_inputs`. Raises DataError for a model that
    is not its guide, CaptureError.
    """
    with usual_settings():
        request = Request(data=data, example_inputs=example_inputs, dynamic=dynamic, inputs=inputs)
        captured = capture(model, request.example(model), request.dynamic)
        captured = with_origin(without_unread(captured, model) if request.guesses_inputs else captured)
        ours, theirs = converted.signature, captured.signature
        if (names := [i.name for i in theirs.inputs]) != (wanted := [i.name for i in ours.inputs]):
            raise DataError(
                f"guide: expected a model with the inputs {', '.join(wanted)}, found {', '.join(names)}. Give the "
                "model that was converted, and data as it was converted on."
            )
        if ours.origin.weights is not None and ours.origin.weights != theirs.origin.weights:
            raise DataError("guide: its weights are not those that were converted. Give the model as it was then.")
        bound_positions(captured.graph_module)
    guide = _alone(captured.graph_module, converted)
    joined = Converted(converted.module, ours, converted.plan, converted.report)
    joined.frontier = Frontier([lambda: guide, lambda: joined])
    return joined


def _alone(graph_module: fx.GraphModule, converted: Converted) -> Converted:
    """The guide as a member of a frontier: nothing is replaced."""
    plan: Plan = converted.plan
    rows = tuple(replace(p, target=KEEP, options={}, scope=None) for p in plan)
    report: ConversionReport = replace(
        converted.report,
        converted=converted.report.guide,
        stages=(),
        params=sum(p.numel() for p in graph_module.parameters()),
        flops=plan.flops,
    )
    return Converted(graph_module, converted.signature, replace(plan, parts=rows), report)
