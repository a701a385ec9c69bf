"""The configuration of a smaller network of the same class, found by what its weights' shapes are then."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thesean.errors import NativeError
from thesean.hf.native.assign import Assignment, Misfit, assignments, slots_of
from thesean.hf.native.layers import Layers
from thesean.hf.native.pieces import Pieces, Smaller

Build = Callable[[Mapping[str, Any], Mapping[str, Any]], nn.Module]  # of a configuration and further arguments

_WHAT = {"mlp": "neurons", "attention": "heads"}
_TOGETHER = 2  # settings that change to one value: heads of queries and of keys


@dataclass(frozen=True)
class Fit:
    """A configuration in which all weights have a place, and the ways of putting them there."""

    config: Mapping[str, Any]
    more: Mapping[str, Any]
    ways: tuple[Assignment, ...]


NOTHING = Misfit(-1, "the guide's class takes no configuration with these sizes.")


@dataclass
class Search:
    """Configurations of one class, tried one after the other. `nearest`: what the best that didn't fit lacks."""

    build: Build
    layers: Layers
    pieces: Pieces
    more: Mapping[str, Any]
    nearest: Misfit = NOTHING

    def fits(self, config: Mapping[str, Any]) -> Iterator[Fit]:
        """All that fit, those with the fewest changes first."""
        for fewer in self.layers.fewer(config):
            if self.skeleton(fewer) is not None:
                yield from self._sized(fewer)

    def skeleton(self, config: Mapping[str, Any]) -> nn.Module | None:
        """The network without memory; None where the class refuses this configuration."""
        try:
            with torch.device("meta"):
                return self.build(config, self.more)
        except Exception:  # of somebody else's class, given numbers that may make no sense
            return None

    def _sized(self, config: Mapping[str, Any]) -> Iterator[Fit]:
        wanted = _numbers(self.pieces.smaller)
        made = [dict(config)]
        for kind, number in wanted.items():  # one kind after the other: together there would be too many
            made = [
                {**before, **change}
                for before in made
                for change in self._changes(before, kind, number)
                if not isinstance(self._try({**before, **change}, kind), Misfit)
            ]
        for sized in made:
            found = self._try(sized)
            if not isinstance(found, Misfit):
                yield Fit(sized, self.more, tuple(found))
            elif found.lacks_bias:
                for biased in _with_biases(sized):
                    more = self._try(biased)
                    if not isinstance(more, Misfit):
                        yield Fit(biased, self.more, tuple(more))

    def _try(self, config: Mapping[str, Any], kind: str | None = None) -> list[Assignment] | Misfit:
        """`kind`: look at parts of this kind alone, and at their matrices."""
        model = self.skeleton(config)
        if model is None:
            return Misfit(-1, "")
        found = assignments(model, self.layers, self.pieces, kind)
        if isinstance(found, Misfit) and found.rank > self.nearest.rank:
            self.nearest = found
        return found

    def _changes(self, config: Mapping[str, Any], kind: str, number: int) -> Iterator[dict[str, int]]:
        """Settings that are a size of the matrices there, or divide one, become `number`; None stands for a default."""
        yield {}
        model = self.skeleton(config)
        first = next(module for module in self.pieces.smaller if module.kind == kind)
        if model is None:
            return
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        filled = {self.layers.renamed(name) for name in self.pieces.weights}
        dims = {d for shape in slots_of(first, shapes, filled, self.layers).values() for d in shape}
        names = []
        for key, value in config.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0 and value != number
            if kind == "mlp":
                fits = value is None or (whole and value in dims)
            else:
                fits = whole and any(d % value == 0 for d in dims)
            names += [key] if fits else []
        for count in range(1, 2 if kind == "mlp" else _TOGETHER + 1):
            for chosen in itertools.combinations(names, count):
                yield dict.fromkeys(chosen, number)


def _numbers(smaller: Sequence[Smaller]) -> dict[str, int]:
    """Of each kind of part the one that all have. Raises NativeError."""
    wanted: dict[str, int] = {}
    for module in smaller:
        if wanted.setdefault(module.kind, module.number) != module.number:
            raise NativeError(
                f"{module.path}: {module.number} {_WHAT[module.kind]}, other parts have {wanted[module.kind]}: a "
                "configuration has one number for all layers. Convert all of them to one width."
            )
    return wanted


def _with_biases(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """With settings on that may give linear maps a bias."""
    names = [key for key, value in config.items() if value is False]
    for count in (1, 2):
        for chosen in itertools.combinations(names, count):
            yield {**config, **dict.fromkeys(chosen, True)}


def variants(cls: type) -> Iterator[dict[str, bool]]:
    """Arguments of a constructor beside its configuration: none, and each switch turned."""
    yield {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
        if isinstance(parameter.default, bool):
            yield {name: not parameter.default}
