"""How long the units of a recurrence remember at the start: spread geometrically, so that none has to be learnt first.

N heads, units or channels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def span(memory: Sequence[float]) -> tuple[float, float]:
    """(tokens that the first one remembers, tokens that the last one does), from an option or from JSON."""
    first, last = memory
    return float(first), float(last)


def spread(memory: tuple[float, float], count: int) -> torch.Tensor:
    """tokens_N, geometrically from the first to the last."""
    return torch.logspace(math.log10(memory[0]), math.log10(memory[1]), count)


def decay_bias(tokens_N: torch.Tensor) -> torch.Tensor:
    """The bias under which exp(-softplus(bias)) forgets by e over so many tokens: softplus of it is 1 / tokens."""
    return torch.log(torch.expm1(1 / tokens_N))


def later(memory: tuple[float, float], ahead: int) -> tuple[float, float]:
    """Of a module that is asked `ahead` steps late: as many tokens more, so that the step itself is not forgotten."""
    return memory[0] + ahead, memory[1] + ahead
