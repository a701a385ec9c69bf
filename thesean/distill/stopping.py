"""When a stage ends: by a plateau of the held-out measure, by its ceiling, or by its budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Plateau:
    """Feed it held-out losses, lower is better. `done` after `patience` of them without a relative improvement of
    `min_improvement` over the best, or once one is at or below `ceiling`.
    """

    patience: int
    min_improvement: float
    ceiling: float
    best: float = field(default=float("inf"), init=False)
    waited: int = field(default=0, init=False)
    reason: str = field(default="budget", init=False)

    def update(self, loss: float) -> bool:
        """Whether `loss` is the best so far; see `done` afterwards."""
        improved = loss < self.best
        if loss < self.best * (1 - self.min_improvement) or self.best == float("inf"):
            self.waited = 0
        else:
            self.waited += 1
        self.best = min(self.best, loss)
        if self.best <= self.ceiling:
            self.reason = "ceiling"
        elif self.waited >= self.patience:
            self.reason = "plateau"
        return improved

    @property
    def done(self) -> bool:
        return self.reason != "budget"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.reason = state["best"], state["waited"], state["reason"]
