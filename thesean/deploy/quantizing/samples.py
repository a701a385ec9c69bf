"""What a quantised file is calibrated on and held against the exact one on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

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

    calibration: Sequence[dict[str, torch.Tensor]]
    held_out: Sequence[dict[str, torch.Tensor]]
    judged: Callable[[Sequence[Outputs]], Judge]
    are_given: bool
    told: str  # of whom the held-out ones are
