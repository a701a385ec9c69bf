"""Running statistics of batch norms computed anew, exactly: those of all examples together, and no moving average.

While a part is trained its inputs move, and what a moving average kept of them is of parts that are no more. Norms come
one after the other, as data passes, for each reads what the one before makes of it (precise BN: Wu and Johnson 2021).

N values of a channel over batches, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from thesean import exchange, ranks
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.modes import evaluating
from thesean.passes.plan.hybrid import Hybrid

Inputs = dict[str, torch.Tensor]


def batch_norms(hybrid: Hybrid, part: int) -> list[_BatchNorm]:
    """Those of a part's modules that keep statistics."""
    found = [m for r in hybrid.of_part(part) for m in hybrid.module(r).modules()]
    return [m for m in found if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def recalibrate(hybrid: Hybrid, part: int, batches: Sequence[Inputs]) -> None:
    """Of one part, on its inputs in the hybrid as it is now. Leaves train/eval flags as they were."""
    ends = [r.exit for r in hybrid.of_part(part)]
    prefix = intermediates(hybrid.graph_module, ends, with_output=False)
    called: dict[_BatchNorm, None] = {}  # in the order in which data passes them
    seen = {norm: (lambda module, given: called.setdefault(module)) for norm in batch_norms(hybrid, part)}
    _watched(prefix, batches[:1], seen)
    for norm in called:
        moments = _Moments()
        _watched(prefix, batches, {norm: moments.add})
        moments.everyone()
        moments.write(norm)


def _watched(prefix: nn.Module, batches: Sequence[Inputs], hooks: Mapping[_BatchNorm, Callable[..., None]]) -> None:
    """Run through batches with each hook told what its norm reads."""
    handles = [norm.register_forward_pre_hook(hook) for norm, hook in hooks.items()]
    try:
        with evaluating(prefix):
            for inputs in batches:
                prefix(**inputs)
    finally:
        for handle in handles:
            handle.remove()


class _Moments:
    """Mean and variance over all that is added, in double, batch by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_C = self.squares_C = torch.zeros((), dtype=torch.float64)

    def add(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        x_CN = given[0].transpose(0, 1).flatten(1).double()
        count, mean_C = x_CN.shape[1], x_CN.mean(1)
        squares_C = (x_CN - mean_C.unsqueeze(1)).square().sum(1)
        total = self.count + count
        apart_C = mean_C - self.mean_C.to(mean_C.device)
        self.squares_C = self.squares_C.to(mean_C.device) + squares_C + apart_C.square() * (self.count * count / total)
        self.mean_C = self.mean_C.to(mean_C.device) + apart_C * (count / total)
        self.count = total

    def everyone(self) -> None:
        """Of the rows of all ranks."""
        if ranks.count() == 1:
            return
        count, before_C = torch.tensor([float(self.count)], dtype=torch.float64), self.mean_C
        sum_C = before_C * self.count
        count = count.to(sum_C.device)
        exchange.add_up([count, sum_C], "statistics")
        self.mean_C = sum_C / count
        self.squares_C += (before_C - self.mean_C).square() * self.count
        exchange.add_up([self.squares_C], "statistics")
        self.count = int(count)

    def write(self, norm: _BatchNorm) -> None:
        """The variance as torch keeps it, without bias."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(self.mean_C)
        norm.running_var.copy_(self.squares_C / max(1, self.count - 1))
