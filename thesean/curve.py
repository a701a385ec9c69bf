"""What one run of the optimizer did, for the report: its rate, the loss of its steps, and what was held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# More points say no more: neighbours are averaged.
_POINTS = 500


@dataclass(frozen=True, kw_only=True)
class Curve:
    """`phase` is "trial", "align", "fine-tune" or a baseline's name; `part` what is aligned, None for the whole.

    `losses[i]` is the mean training loss of the steps from i * every. `held_out` holds pairs (step, value), the start
    as step 0: while aligning the measure at the part's exit, after that the user's loss, or the divergence from the
    guide where there is none. `kept` is the step whose state was gone on from, 0 where that was the start.
    """

    phase: str
    part: str | None
    learning_rate: float
    steps: int
    every: int
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    kept: int

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Curve:
        pairs = tuple((int(step), float(value)) for step, value in data["held_out"])
        return Curve(**{**data, "losses": tuple(data["losses"]), "held_out": pairs})

    def __str__(self) -> str:
        values = [f"{value:.4f}" for _, value in self.held_out]
        if len(values) > 8:
            values = [*values[:4], "...", *values[-3:]]
        where = f" {self.part}" if self.part else ""
        return (
            f"{self.phase}{where}, rate {self.learning_rate:g}: held out {' '.join(values)}; "
            f"kept step {self.kept} of {self.steps}"
        )


@dataclass
class Tracing:
    """A curve as it is drawn."""

    phase: str
    part: str | None
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "held_out": list(self.held_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses, self.held_out = list(state["losses"]), list(state["held_out"])

    def done(self, kept: int) -> Curve:
        every = -(-len(self.losses) // _POINTS) or 1
        pieces = [self.losses[i : i + every] for i in range(0, len(self.losses), every)]
        return Curve(
            phase=self.phase,
            part=self.part,
            learning_rate=self.learning_rate,
            steps=len(self.losses),
            every=every,
            losses=tuple(_short(sum(piece) / len(piece)) for piece in pieces),
            held_out=tuple((step, _short(value)) for step, value in self.held_out),
            kept=kept,
        )


def _short(value: float) -> float:
    return float(f"{value:.6g}")
