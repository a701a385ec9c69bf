"""How many steps a run of the optimizer takes, where seconds decide: counted anew on the way, at the pace so far.

A trial's pace is that of three steps, or of another load of the machine. With a count that is too low a learning rate
has fallen early, and with one that is too high it is cut off before it has.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from thesean import ranks


@dataclass
class Course:
    """So many `steps` in all, as far as is known. Where it `ends`, on the monotonic clock, as many as fit."""

    steps: int
    ends: float = math.inf
    _before: int = 0
    _began: float = field(default_factory=time.monotonic)

    def count(self, taken: int) -> None:
        """Anew, after so many steps."""
        if self.ends == math.inf or taken <= self._before:
            return
        now = time.monotonic()
        more = (self.ends - now) * (taken - self._before) / (now - self._began)
        self.steps = taken + int(ranks.agreed(max(0.0, more))[0])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def resumed(self, taken: int) -> None:
        """What was taken before an interruption tells nothing of the pace from here."""
        self._before, self._began = taken, time.monotonic()
