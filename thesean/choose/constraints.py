"""What a conversion may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thesean.errors import PlanError

LatencyKind = Literal["prefill", "token"]

# Bounds on sums over the network
SUMS = ("params", "flops")


class Constraints(BaseModel):
    """At least one of the four bounds; latency and speed-up are measured in onnxruntime, one thread.

    `context` and `batch` say where latency is measured; by default at the example inputs' length, one row. "token" is
    the cost of one more token with the state carried, which only a plan without a kept attention can have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    latency_ms: float | None = Field(default=None, gt=0)
    speedup: float | None = Field(default=None, gt=0, description="over the guide's latency there")
    params: int | None = Field(default=None, gt=0, description="of the whole network")
    flops: int | None = Field(default=None, gt=0, description="of one forward at the plan's sizes")
    context: int | None = Field(default=None, gt=0)
    batch: int = Field(default=1, gt=0)
    kind: LatencyKind = "prefill"

    @property
    def measures(self) -> bool:
        """Whether latency has to be measured."""
        return self.latency_ms is not None or self.speedup is not None

    def __str__(self) -> str:
        bounds = []
        if self.latency_ms is not None:
            bounds.append(f"latency at most {self.latency_ms:g} ms")
        if self.speedup is not None:
            bounds.append(f"{self.speedup:g} times as fast as the guide")
        if self.params is not None:
            bounds.append(f"at most {self.params:,} parameters")
        if self.flops is not None:
            bounds.append(f"at most {self.flops:,} FLOPs")
        return " and ".join(bounds)


Budgets = Sequence[Constraints | Mapping[str, Any]]


def parse_constraints(given: Constraints | Mapping[str, Any] | None) -> Constraints:
    """Raises PlanError that names the wrong field, or says which bounds there are."""
    if isinstance(given, Constraints):
        found = given
    else:
        if given is not None and not isinstance(given, Mapping):
            raise PlanError(f"constraints: expected a dict, found {type(given).__name__}.")
        try:
            found = Constraints.model_validate(dict(given or {}))
        except ValidationError as error:
            first = error.errors()[0]
            known = ", ".join(Constraints.model_fields)
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"constraints: {where}: {first['msg']}. known: {known}.") from error
    if all(v is None for v in (found.latency_ms, found.speedup, found.params, found.flops)):
        raise PlanError(
            "target 'auto' needs a budget: constraints={'latency_ms': 5.0, 'context': 512}, {'speedup': 1.5}, "
            "{'params': ...} or {'flops': ...}."
        )
    return found


def parse_budgets(given: Budgets) -> tuple[Constraints, ...]:
    """Several budgets, each as `parse_constraints` takes it. Raises PlanError, also where latency is not bounded in the
    same place by all that bound it: one probing times in one.
    """
    if not given:
        raise PlanError("constraints: expected at least one budget, found none.")
    found = []
    for number, one in enumerate(given):
        try:
            found.append(parse_constraints(one))
        except PlanError as error:
            raise PlanError(str(error).replace("constraints:", f"constraints[{number}]:", 1)) from error
    places = dict.fromkeys((c.context, c.batch, c.kind) for c in found if c.measures)
    if len(places) > 1:
        raise PlanError(
            "constraints: one probing times in one place, so all budgets of latency need the same context, batch and "
            f"kind; found {', '.join(map(str, places))}. Ask for the others in a call of their own."
        )
    return tuple(found)
