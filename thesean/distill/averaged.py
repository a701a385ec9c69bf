"""The mean of the weights of the last steps, which is where a rate is heading that is too high to stand still.

At a constant rate weights move about the place that they look for, as far as the rate is high; their mean is nearer to
it than any of them (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407). A rate that pays in the end is
told by it long before it has fallen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from thesean.distill.masters import Masters

_LATEST = 0.05  # what the latest step counts of a mean of many: it is about twenty

# Of fewer steps in all there is no mean: rates that it speaks for pay as they fall, and that takes more than are left.
_LEAST = 240


def average_of(steps: int) -> Averaged | None:
    """Of a fine-tuning of so many; None where those are few."""
    return Averaged() if steps >= _LEAST else None


class Averaged:
    """Of what the masters hold, float32 where weights are in half precision. Exponential, and over all steps while
    they are few.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._masters: Masters | None = None
        self._means: list[torch.Tensor] = []

    def begin(self, masters: Masters) -> None:
        """Before the first step."""
        self._masters, self._means = masters, [torch.zeros_like(p) for p in masters.parameters]

    @torch.no_grad()
    def add(self) -> None:
        """After a step."""
        assert self._masters is not None
        self.steps += 1
        own = [p.detach() for p in self._masters.parameters]
        torch._foreach_lerp_(self._means, own, max(_LATEST, 1 / self.steps))

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, the network has the means for its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        assert self._masters is not None
        for own, mean in zip(self._masters.parameters, self._means, strict=True):
            kept = own.detach().clone()
            own.copy_(mean)
            mean.copy_(kept)
        self._masters.write()

    def state_dict(self) -> dict[str, Any]:
        assert self._masters is not None
        means = [self._masters.spread(k, mean) for k, mean in enumerate(self._means)]
        return {"steps": self.steps, "means": means}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self._masters is not None
        self.steps = state["steps"]
        for number, (mean, value) in enumerate(zip(self._means, state["means"], strict=True)):
            mean.copy_(self._masters.cut(number, value))
