"""Which channels of a stretch of steps are its own, and the same steps with fewer of them.

Channels that an elementwise step, a norm, a pool or a depthwise convolution hands on one by one are the same channels,
and so are those of values that are added or multiplied. Such a group of channels can lose some where it is neither the
input's nor the output's, and all that makes and reads it is known: plain convolutions, of which rows and columns go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from thesean.targets.shared.channels import Concatenate, Convolution, GroupNorm, Norm, Pick, Scale, Slope, Step, Weights


@dataclass(frozen=True)
class Channels:
    """A group of channels that can lose some: those values are its own, and those steps make, hand on and read it."""

    count: int
    values: frozenset[int]
    makers: tuple[int, ...]  # convolutions whose rows they are
    along: tuple[int, ...]  # steps that have numbers of their own for each of them
    readers: tuple[int, ...]  # convolutions whose columns they are
    block: int = 1  # so many in a row stay or go together


class Map(NamedTuple):
    """How many channels a value has, and how many places."""

    channels: int
    places: int


def inner_channels(steps: Sequence[Step], maps: Sequence[Map]) -> tuple[Channels, ...]:
    """The groups that can lose channels, first to last, where the values are such `maps`.

    Channels that are seen as means of a map alone, as between a gate's two layers, cost nothing and stay.
    """
    group = list(range(len(steps) + 1))

    def root(value: int) -> int:
        while group[value] != value:
            value = group[value]
        return value

    def same(a: int, b: int) -> None:
        first, second = sorted((root(a), root(b)))
        group[second] = first

    fixed: set[int] = {0, len(steps)}
    for number, step in enumerate(steps):
        if isinstance(step, Convolution):
            if step.block:
                same(step.of, number + 1)
            elif not step.mixes:
                fixed |= {step.of, number + 1}
            continue
        if isinstance(step, (Norm, Concatenate, Pick)):  # all of its channels meet, or stand in a place of their own
            fixed |= {*step.reads, number + 1}
            continue
        for read in step.reads:
            if maps[read].channels == maps[number + 1].channels:
                same(read, number + 1)
            else:  # one channel for all
                fixed.add(read)
    fixed = {root(value) for value in fixed}
    found = []
    for first in sorted({root(v) for v in range(len(steps) + 1)} - fixed):
        values = frozenset(v for v in range(len(steps) + 1) if root(v) == first)
        if max(maps[v].places for v in values) == 1 < maps[0].places:
            continue
        makers = [n for n, s in enumerate(steps) if n + 1 in values and isinstance(s, Convolution) and s.mixes]
        along = [n for n, s in enumerate(steps) if n + 1 in values and n not in makers and _has_weights(s)]
        readers = [n for n, s in enumerate(steps) if isinstance(s, Convolution) and s.mixes and s.of in values]
        counts = {_made(steps[n]) for n in makers}
        block = math.lcm(*(s.block for n in along if isinstance(s := steps[n], (Convolution, GroupNorm))))
        if makers and readers and len(counts) == 1 and block not in counts:
            found.append(Channels(counts.pop(), values, tuple(makers), tuple(along), tuple(readers), block))
    return tuple(found)


def _made(step: Step) -> int:
    assert isinstance(step, Convolution)
    return step.channels_out


def _has_weights(step: Step) -> bool:
    return isinstance(step, (Convolution, Scale, GroupNorm)) or (isinstance(step, Slope) and step.channels > 1)


@dataclass(frozen=True, kw_only=True)
class ChannelFacts:
    """A part that maps feature maps, read off the graph: its steps, their weights, and what each value is.

    `channels_last`: the part reads and gives (B, ..., C), as sequences are; the steps have them (B, C, ...).
    """

    steps: tuple[Step, ...]
    weights: Mapping[int, Weights]
    maps: tuple[Map, ...]
    channels_last: bool = False

    @property
    def inner(self) -> tuple[Channels, ...]:
        return inner_channels(self.steps, self.maps)


def narrowed(steps: Sequence[Step], inner: Sequence[Channels], counts: Sequence[int]) -> tuple[Step, ...]:
    """The same steps where each group has so many channels."""
    changed = list(steps)
    for channels, count in zip(inner, counts, strict=True):
        for number in channels.makers:
            changed[number] = changed[number].model_copy(update={"channels_out": count})
        for number in channels.readers:
            changed[number] = changed[number].model_copy(update={"channels_in": count})
        for number in channels.along:
            step = changed[number]
            fewer: dict[str, int] = {"channels": count}
            if isinstance(step, Convolution):
                fewer = {"channels_in": count, "channels_out": count}
            if isinstance(step, (Convolution, GroupNorm)):
                fewer["groups"] = count // step.block
            changed[number] = step.model_copy(update=fewer)
    return tuple(changed)


def keep_rows(weights: dict[int, Weights], channels: Channels, kept_S: torch.Tensor) -> None:
    """In place: what makes a group and hands it on, with the channels that are kept."""
    for number in (*channels.makers, *channels.along):
        weight, bias = weights[number]
        weights[number] = Weights(weight[kept_S], None if bias is None else bias[kept_S])
