"""Whether a conversion is worse than nothing: than a uniform guess, of numbers than their mean, or than its parts
simply left out.

Never one that is no worse than its guide by the user's own loss, however far from it: it went where it was asked to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from thesean.distill.evaluate import Evaluation
from thesean.distill.training import Training
from thesean.passes.plan.hybrid import Hybrid

# A divergence that exceeds another by less, of it and at all, is no worse: held-out rows are few.
_MARGIN, _LEAST = 0.01, 1e-3

# Of the logarithm of the classes: a guide nearer to a uniform guess than that, an untrained one, has little to lose.
_KNOWS_LITTLE = 0.15

# How many times a constant's error: what a few examples' mean is worth by itself varies with them.
_BLIND = 1.5

# How many times as near as both is near enough on one batch of a few.
_FAR = 2.0


@torch.no_grad()
def lost_by(
    hybrid: Hybrid, training: Training, final: Evaluation, guide: Evaluation, on_the_way: Mapping[str, float]
) -> str:
    """What to tell of a hybrid that is worse than nothing, "" of any other. `final` is what was found of it, and
    `on_the_way` the divergence after each of its parts, by its path and in the order in which they came, which says
    which one did it.
    """
    is_ahead = final.loss is not None and guide.loss is not None and final.loss <= guide.loss
    if not hybrid.parts or is_ahead or not final.divergence > _LEAST:
        return ""
    # from here on by the divergence alone: a loss of the user's own may be anything, and cost anything
    judge, outputs = training.judge, training.task.outputs
    sample = judge.sample
    first, classes = sample[:1], outputs.classes if outputs.of_classes else 0

    def guess(numbers: Sequence[int]) -> float:
        alone = min(judge.rows[number] for number in numbers) == 1  # which is its own mean
        if classes < 2 and (alone or not outputs.of_numbers):
            return math.inf
        blind = _mean if outputs.of_numbers else _flat
        return judge.divergence(lambda _, wanted: pytree.tree_map(blind, wanted), numbers)

    def network(numbers: Sequence[int]) -> float:
        return judge.divergence(lambda k, _: hybrid.graph_module(**judge.batches[k][1]), numbers)

    def without(numbers: Sequence[int]) -> tuple[float, list[str]]:
        with left_out(hybrid) as names:
            return network(numbers) if names else math.inf, names

    far = guess(first)
    if (classes > 1 and far < _KNOWS_LITTLE * math.log(classes)) or final.divergence * _FAR < min(
        far, without(first)[0]
    ):
        return ""
    own, uniform, (bare, names) = network(sample), guess(sample), without(sample)
    told = []
    if outputs.of_numbers and _worse(own, _BLIND * uniform):
        told.append(f"a constant, the guide's mean output, is nearer ({uniform:.4g})")
    elif outputs.of_classes and _worse(own, uniform):
        told.append(f"a uniform guess over {classes} classes is nearer ({uniform:.4g})")
    if _worse(own, bare):
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        told.append(f"with {some} simply left out it is {bare:.4g}")
    if not told:
        return ""
    unit = " nats" if outputs.of_classes else ""
    return f"the conversion is {own:.4g}{unit} from the guide, and {' and '.join(told)}. {_blamed(hybrid, on_the_way)}"


def _worse(own: float, other: float) -> bool:
    return own > other * (1 + _MARGIN) and own > other + _LEAST


def _blamed(hybrid: Hybrid, on_the_way: Mapping[str, float]) -> str:
    """Which part did it, and what to do."""
    told = "Train for longer, or choose another target."
    if len(on_the_way) == len(hybrid.parts):
        after = list(on_the_way.values())
        rises = [b - a for a, b in zip((0.0, *after), after, strict=False)]
        worst = max(range(len(rises)), key=rises.__getitem__)
        path = list(on_the_way)[worst]
        told = (
            f"It is {path} that did most of it: {after[worst] - rises[worst]:.4g} before, {after[worst]:.4g} after. "
            f"Keep it (keep={path!r}), or let max_drop in the recipe keep what costs too much."
        )
    return told


@contextmanager
def left_out(hybrid: Hybrid) -> Iterator[list[str]]:
    """Inside, the parts that can be do nothing: what was added to a residual stream is 0, and what stood in line hands
    on what it gets. Yields their paths.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for r in hybrid.replacements:
        module = hybrid.module(r)
        if r.family != "identity" and r.facts.input_shape == r.facts.output_shape:
            found[r.name] = (module, hybrid.parts[r.part])
            stateful = bool(getattr(module, "stateful", False))
            setattr(hybrid.graph_module, r.name, _LeftOut(added=r.join is not None, stateful=stateful))
    try:
        yield list(dict.fromkeys(path for _, path in found.values()))
    finally:
        for name, (module, _) in found.items():
            setattr(hybrid.graph_module, name, module)


class _LeftOut(nn.Module):
    def __init__(self, added: bool, stateful: bool) -> None:
        super().__init__()
        self.added, self.stateful = added, stateful

    def forward(self, x: torch.Tensor, *args: Any, **given: Any) -> Any:
        y = torch.zeros_like(x) if self.added else x
        return (y, None) if self.stateful else y


def _flat(value: Any) -> Any:
    """Equal logits."""
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _mean(value: Any) -> Any:
    """What each channel is on average, everywhere: the last dimension's of vectors and sequences, a map's second."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.ndim:
        return value
    channel = 1 if value.ndim > 3 else value.ndim - 1
    return value.mean([d for d in range(value.ndim) if d != channel], keepdim=True).expand_as(value)
