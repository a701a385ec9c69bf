"""Modules as tests read them: by attribute, whatever the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thesean.targets import PartFacts, Target, build_module
from thesean.targets.shared.family import Scope
from thesean.targets.shared.module import State


def build(name: str, part: PartFacts, *, scope: Scope | None = None, **options: Any) -> Any:
    return build_module(Target(name, scope=scope, **options), part)


def started(name: str, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]], **options: Any) -> Any:
    """A module as a conversion starts it: with what it copies, and what it chooses on examples where there are any."""
    module = build(name, part, **options).eval()
    module.copy_from(part)
    if examples:
        module.prepare(part, examples)
    return module


def tensors(state: State) -> tuple[torch.Tensor, ...]:
    """A module's state as a tuple, whether it is one tensor or several."""
    return state if isinstance(state, tuple) else (state,)
