"""Who watches a conversion: progress bars and logs implement this, the trainer calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """A phase is opened by `begin`, told about by `step` and closed by `end`; `close` comes once, whatever happens.

    `stage` counts from 1 to `stages`.
    """

    def begin(self, phase: str, part: str | None, stage: int, stages: int, steps: int) -> None: ...

    def step(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...
