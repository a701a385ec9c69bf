"""The state of modules that did best on held-out data, whatever training did afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from thesean.errors import DataError


class Best:
    """Feed it held-out values, lower is better, each right when the modules are in the state that it is of."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.value = float("inf")
        self.step = 0
        self._state: list[dict[str, torch.Tensor]] = []

    @torch.no_grad()
    def offer(self, value: float, step: int = 0) -> bool:
        """Whether the value is the lowest so far; the modules' state is kept then. NaN is never."""
        if not value < self.value:
            return False
        self.value, self.step = value, step
        states = [m.state_dict() for m in self.modules]
        if not self._state:
            self._state = [{k: v.clone() for k, v in state.items()} for state in states]
        else:  # into the room that the last one had
            for kept, state in zip(self._state, states, strict=True):
                for name, tensor in state.items():
                    kept[name].copy_(tensor)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step = state["value"], state["step"]
        self._state = [
            {name: tensor.to(own[name].device) for name, tensor in kept.items()}
            for kept, own in zip(state["state"], [m.state_dict() for m in self.modules], strict=False)
        ]

    def restore(self) -> None:
        """Raises DataError where no value was a number."""
        if not self._state:
            raise DataError("the held-out measure was never a number; look for NaN in the data.")
        for module, state in zip(self.modules, self._state, strict=True):
            module.load_state_dict(state)
