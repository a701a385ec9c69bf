"""What a quantised file is calibrated on and held against the exact one on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch

Inputs = dict[str, torch.Tensor]
Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How far outputs are from those of the exact file, by name: `distance(outputs, exact)`, in `unit`. `classes`: of
    which outputs the largest of the last dimension is an answer.
    """

    distance: Callable[[Outputs, Outputs], float]
    unit: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs by name. `judged`: what the outputs are, from the exact file's own on inputs that differ. `are_given`:
    they are the caller's own, not made of the example.
    """

    calibration: Sequence[Inputs]
    held_out: Sequence[Inputs]
    judged: Callable[[Sequence[Outputs]], Judge]
    are_given: bool
    told: str  # of whom the held-out ones are

    def each(self, make: Callable[[Inputs], Inputs]) -> Samples:
        """What is made of each of the inputs, in their place."""
        return replace(self, calibration=_Made(self.calibration, make), held_out=_Made(self.held_out, make))


@dataclass(frozen=True)
class _Made(Sequence[Inputs]):
    """Made when they are asked for: a batch's keys and values are larger than its tokens."""

    inputs: Sequence[Inputs]
    make: Callable[[Inputs], Inputs]

    def __len__(self) -> int:
        return len(self.inputs)

    @overload
    def __getitem__(self, at: int) -> Inputs: ...

    @overload
    def __getitem__(self, at: slice) -> _Made: ...

    def __getitem__(self, at: int | slice) -> Inputs | _Made:
        return _Made(self.inputs[at], self.make) if isinstance(at, slice) else self.make(self.inputs[at])
