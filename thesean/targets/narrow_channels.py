"""The same convolutions with fewer of the channels between them.

B batch, C channels, O output channels, I input channels, K taps of a kernel, W channels of a group, S those kept,
N places of maps, F features of the last layer
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thesean.errors import NumericalError
from thesean.targets.shared.channel_groups import ChannelFacts, Channels, keep_rows, narrowed
from thesean.targets.shared.channels import (
    Activate,
    Convolution,
    GroupNorm,
    Join,
    Norm,
    Scale,
    Slope,
    Step,
    Weights,
    needs,
    read_steps,
    run_all,
    run_steps,
)
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.fewer_channels import MULTIPLE, NarrowChannelsOptions, check_channels, fewer
from thesean.targets.shared.fit_channels import SOLVED_FEATURES, Narrowing, in_blocks, patches
from thesean.targets.shared.module import State, TargetModule
from thesean.targets.shared.sequence import SmallLinear


class NarrowChannels(TargetModule):
    """The part's own steps, y = steps(x), with fewer channels inside. (B, C, ...) -> (B, O, ...), of any size, or
    (B, ..., C) -> (B, ..., O) where `channels_last`.

    `copy_from` keeps the channels with the largest weights; `prepare` chooses them anew by what they do to what reads
    them, and folds the others into that, each place by itself (He, Zhang and Sun 2017; Luo, Wu and Lin 2017, with the
    choice made by least squares). A convolution that comes last, or last before the part's sum and a rectifier, is
    `last`, which is solved as the linear map of patches that it is.
    """

    family = "narrow-channels"

    def __init__(self, *, steps: list[dict[str, Any]], channels_last: bool = False) -> None:
        """Raises ValueError for what is none of the steps."""
        super().__init__()
        self.steps = read_steps(steps)
        self.channels_last = channels_last
        self.solved = _solved(self.steps)
        self.weights = nn.ModuleDict(
            {str(n): made for n, s in enumerate(self.steps) if n != self.solved and (made := _weights_of(s))}
        )
        if self.solved is not None:
            step = self._last_step
            self.last = SmallLinear(step.channels_in * math.prod(step.kernel), step.channels_out)

    def config(self) -> dict[str, Any]:
        return {"steps": [step.model_dump(mode="json") for step in self.steps], "channels_last": self.channels_last}

    def unlike(self, part: PartFacts) -> str:
        facts = part.channels
        if facts is None or tuple(self.steps) != tuple(facts.steps):
            return ""
        return (
            f"no channel goes: what stays is a multiple of {MULTIPLE} where there are {2 * MULTIPLE} or more. A lower "
            "ratio= or a width= takes some"
        )

    @property
    def _last_step(self) -> Convolution:
        """The convolution that `last` holds the weights of."""
        assert self.solved is not None
        step = self.steps[self.solved]
        assert isinstance(step, Convolution)
        return step

    def own_weights(self) -> dict[int, Weights]:
        """By step, as it takes them."""
        found = {int(n): Weights(h.weight, h.bias) for n, h in self.weights.items() if isinstance(h, _Held)}
        if self.solved is not None:
            step = self._last_step
            shape = (step.channels_out, step.channels_in, *step.kernel)
            found[self.solved] = Weights(self.last.weight.view(shape), self.last.bias)
        return found

    def forward(self, x: torch.Tensor, state: State | None = None) -> torch.Tensor:
        return self._value(x, len(self.steps))

    def _value(self, x: torch.Tensor, wanted: int) -> torch.Tensor:
        """One of the steps' values, laid out as the part has it."""
        y = run_steps(self.steps, self.own_weights(), self._first(x), wanted)
        return y.movedim(1, -1) if self.channels_last else y

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        """Channels first."""
        return x.movedim(-1, 1) if self.channels_last else x

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """What the last convolution reads at each place, (B, ..., F)."""
        step = self._last_step
        read = run_steps(self.steps, self.own_weights(), self._first(x), step.of)
        return patches(read, step).flatten(-1 - len(step.kernel)), None

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.channels_last else y.movedim(-1, 1)

    def unshape(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.channels_last else y.movedim(1, -1)

    def complete(
        self, x: torch.Tensor, features: torch.Tensor, state: State | None, mask: torch.Tensor | None = None
    ) -> Any:
        y = super().complete(x, features, state, mask)
        return y.relu() if _rectified(self.steps) else y

    def wanted(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Where a rectifier comes last: y where it is above zero, and elsewhere what is below zero already."""
        if not _rectified(self.steps):
            return y
        own = self._value(x, self.steps[-1].of)
        return torch.where(y > 0, y, own.clamp(max=0).to(y.dtype))

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        end = _solvable(self.steps)[-1]
        if self.solved is None or not isinstance(end, Join):
            return None
        (other,) = {end.of, end.other} - {self.solved + 1}
        return self._value(x, other)

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        shape = [sizes[d] if isinstance(d, str) else d for d in part.input_shape]
        weights, total = {n: own.to("meta") for n, own in self.own_weights().items()}, 0
        values = run_all(self.steps, weights, self._first(torch.empty(shape, device="meta")))
        for number, step in enumerate(self.steps):
            if isinstance(step, Convolution):
                # each weight meets each place of the output, or of the input where that is the smaller one
                places = values[step.of if step.transposed else number + 1]
                total += 2 * places.shape[0] * math.prod(places.shape[2:]) * weights[number].weight.numel()
        return total

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Of each group the channels whose weights' norms multiply to the most: a guess without data."""
        facts = part.channels
        if facts is None or not self._fits(facts):
            return ()
        weights = dict(facts.weights)
        for channels in facts.inner:
            made_W = sum(weights[n].weight.flatten(1).norm(dim=1) for n in channels.makers)
            read_W = sum(weights[n].weight.transpose(0, 1).flatten(1).norm(dim=1) for n in channels.readers)
            count = self._count(channels)
            score_W = torch.as_tensor(made_W * read_W)
            best = score_W.view(-1, channels.block).sum(1).topk(count // channels.block).indices.sort().values
            kept_S = in_blocks(best, channels.block)
            for number in channels.readers:
                weights[number] = weights[number]._replace(weight=weights[number].weight[:, kept_S])
            keep_rows(weights, channels, kept_S)
        self._take(weights)
        return ("convolutions",)

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Group after group, on the guide's inputs of the part: what reads a group is fitted to what it gave in the
        guide, from what the groups before leave of it.

        Raises NumericalError where the activations are not finite.
        """
        facts = part.channels
        if facts is None or not self._fits(facts) or not examples:
            return
        narrowing = Narrowing(facts, [self._first(x) for x, _ in examples])
        for channels in facts.inner:
            try:
                narrowing.keep(channels, self._count(channels))
            except ValueError as error:
                raise NumericalError(
                    f"{part.path}: can't choose channels, {error}. Look for NaN in the data."
                ) from error
        self._take(narrowing.weights)

    def _count(self, channels: Channels) -> int:
        step = self.steps[channels.makers[0]]
        assert isinstance(step, Convolution)
        return step.channels_out

    def _fits(self, facts: ChannelFacts) -> bool:
        if len(facts.steps) != len(self.steps) or facts.channels_last != self.channels_last:
            return False
        counts = [self._count(channels) for channels in facts.inner]
        return narrowed(facts.steps, facts.inner, counts) == self.steps

    def _take(self, weights: Mapping[int, Weights]) -> None:
        for number, held in self.own_weights().items():
            held.weight.copy_(weights[number].weight)
            if held.bias is not None:
                bias = weights[number].bias
                assert bias is not None
                held.bias.copy_(bias)


def _rectified(steps: Sequence[Step]) -> bool:
    end = steps[-1]
    return isinstance(end, Activate) and end.name == "relu" and end.of == len(steps) - 1


def _solvable(steps: Sequence[Step]) -> Sequence[Step]:
    """Without a rectifier at the end."""
    return steps[:-1] if _rectified(steps) else steps


def _solved(steps: Sequence[Step]) -> int | None:
    """The convolution that gives the part's output, or what is added to something else at the very end, but for a
    rectifier.
    """
    steps = _solvable(steps)
    if not steps:
        return None
    end = steps[-1]
    summed = isinstance(end, Join) and end.form == "sum" and end.of != end.other
    ends = end.reads if summed else (len(steps),)
    for value in sorted(ends, reverse=True):
        step = steps[value - 1] if value else None
        if not isinstance(step, Convolution) or not step.mixes:
            continue
        large = step.channels_in * math.prod(step.kernel) > SOLVED_FEATURES
        alone = sum(s.reads.count(value) for s in steps) == int(summed)
        beside = [needs(steps, v) for v in ends if v != value]
        if alone and not large and not any(value in needed for needed in beside):
            return value - 1
    return None


class _Held(nn.Module):
    """A step's weight, and its bias where it has one."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)


def _weights_of(step: Step) -> _Held | None:
    """Where a step's numbers are held, drawn anew."""
    if isinstance(step, Convolution):
        rows, columns = step.channels_out, step.channels_in
        rows, columns = (columns, rows) if step.transposed else (rows, columns)
        weight = torch.empty(rows, columns // step.groups, *step.kernel)
        return _Held(nn.init.kaiming_normal_(weight, nonlinearity="relu"), torch.zeros(step.channels_out))
    if isinstance(step, (Scale, Norm, GroupNorm)):
        return _Held(torch.ones(step.channels), torch.zeros(step.channels))
    if isinstance(step, Slope):
        return _Held(torch.full((step.channels,), 0.25))
    return None


def build(part: PartFacts, options: NarrowChannelsOptions) -> NarrowChannels:
    facts = part.channels
    assert facts is not None  # check
    counts = [fewer(channels, options) for channels in facts.inner]
    steps = narrowed(facts.steps, facts.inner, counts)
    told = [step.model_dump(mode="json") for step in steps]
    return NarrowChannels(steps=told, channels_last=facts.channels_last)


TARGET = Family(
    name="narrow-channels",
    summary="the same convolutions with fewer of the channels between them, the rest folded in",
    options=NarrowChannelsOptions,
    module=NarrowChannels,
    build=build,
    scope="part",
    channels=True,
    check=lambda part, options: check_channels("narrow-channels", part, options),
)
