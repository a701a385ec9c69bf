"""Which of our matrices goes where in another network, by their shapes alone; what shapes leave open is tried.

O outputs, I inputs of a linear map
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from thesean.hf.native.layers import Layers
from thesean.hf.native.pieces import Pieces, Smaller


@dataclass(frozen=True)
class Place:
    """Of a module that holds a matrix, by its path within a part: which of our maps are rows of it, in order, and
    whether it holds (I, O).
    """

    holder: str
    maps: tuple[int, ...]
    turned: bool


@dataclass(frozen=True)
class Assignment:
    """A way for each kind of part, the same in all layers."""

    ways: Mapping[str, tuple[Place, ...]]


@dataclass(frozen=True)
class Misfit:
    """What has no place, in words. `rank`: how far the search came until it met that."""

    rank: int
    told: str

    @property
    def lacks_bias(self) -> bool:
        return self.rank == _BIAS


_KEPT, _MATRICES, _LEFT, _BIAS = range(4)


def assignments(model: nn.Module, layers: Layers, pieces: Pieces, kind: str | None = None) -> list[Assignment] | Misfit:
    """All that the shapes allow. `kind`: only of parts of this kind, and without biases."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = _tied(model)
    own = {layers.renamed(name): tuple(weight.shape) for name, weight in pieces.weights.items()}
    for name, shape in own.items():
        if shapes.get(name) != shape:
            found = shapes.get(name)
            there = f"there it is {found}" if found else "no such weight is there"
            return Misfit(_KEPT, f"{name}: a weight of shape {shape} has no place: {there}.")
    filled = {other for name in own for other in tied.get(name, (name,))}
    ways: dict[str, list[tuple[Place, ...]]] = {}
    lacking: Misfit | None = None
    for module in pieces.smaller:
        if kind not in (None, module.kind):
            continue
        slots = slots_of(module, shapes, filled, layers)
        possible = list(_ways(module, slots))
        if not possible:
            told = ", ".join(f"{name} {shape}" for name, shape in slots.items()) or "nothing"
            ours = ", ".join(str(tuple(m.weight.shape)) for m in module.maps)
            return Misfit(_MATRICES, f"{module.path}: matrices of {ours} have no place; there are: {told}.")
        fitting = possible if kind else [way for way in possible if _takes_biases(module, way, slots)]
        if not fitting:
            told = f"{module.path}: the bias of a linear map has no place in {', '.join(slots)}."
            lacking, fitting = lacking or Misfit(_BIAS, told), possible
        known = ways.setdefault(module.kind, fitting)
        ways[module.kind] = [way for way in known if way in fitting]
        filled |= slots.keys()
    left = next((name for name in shapes if name not in filled), None)
    if left is not None and kind is None:
        return Misfit(_LEFT, f"{left}: nothing of the conversion stands for it.")
    if lacking is not None:
        return lacking
    if empty := next((name for name, found in ways.items() if not found), None):
        return Misfit(_MATRICES, f"the {empty} of different layers don't fit alike.")
    return [Assignment(dict(zip(ways, chosen, strict=True))) for chosen in itertools.product(*ways.values())]


def slots_of(
    module: Smaller, shapes: Mapping[str, tuple[int, ...]], filled: set[str], layers: Layers
) -> dict[str, tuple[int, ...]]:
    """Weights without a value that stand where the module stands."""
    prefixes = tuple(layers.renamed(prefix) for prefix in module.prefixes)
    return {name: shape for name, shape in shapes.items() if name not in filled and name.startswith(prefixes)}


def place(module: Smaller, way: Sequence[Place], slots: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The values of `slots`."""
    holders = _holders(slots)
    values: dict[str, torch.Tensor] = {}
    for placed in way:
        holder, matrix, vector = holders[placed.holder]
        maps = [module.maps[k] for k in placed.maps]
        weight_OI = torch.cat([m.weight.detach() for m in maps])
        values[f"{holder}.{matrix}"] = weight_OI.T if placed.turned else weight_OI
        if vector is not None:
            values[f"{holder}.{vector}"] = torch.cat([m.bias.detach() for m in maps])
    return values


def _holders(slots: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str, str | None]]:
    """By the last name of a module's path, which is the same in all layers: the path, its matrix and its vector."""
    found: dict[str, tuple[str, str, str | None]] = {}
    for name, shape in slots.items():
        holder, _, leaf = name.rpartition(".")
        if len(shape) == 2:
            vector = next((n for n, s in slots.items() if n.rpartition(".")[0] == holder and len(s) == 1), None)
            key = holder if _ending(holder) in found else _ending(holder)
            found[key] = (holder, leaf, None if vector is None else vector.rpartition(".")[2])
    return found


def _ending(holder: str) -> str:
    """What comes behind the number of the layer."""
    steps = holder.split(".")
    last = max((k for k, step in enumerate(steps) if step.isdigit()), default=-1)
    return ".".join(steps[last + 1 :])


def _ways(module: Smaller, slots: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Place, ...]]:
    """Each of our maps in one matrix, no matrix empty, and no vector without a matrix."""
    holders = _holders(slots)
    if sum(2 if vector else 1 for _, _, vector in holders.values()) != len(slots):
        return
    yield from _filled(module, list(holders.items()), slots, tuple(range(len(module.maps))))


def _filled(
    module: Smaller,
    holders: list[tuple[str, tuple[str, str, str | None]]],
    slots: Mapping[str, tuple[int, ...]],
    left: tuple[int, ...],
) -> Iterator[tuple[Place, ...]]:
    if not holders:
        if not left:
            yield ()
        return
    (key, (holder, matrix, _)), *rest = holders
    shape = slots[f"{holder}.{matrix}"]
    for count in range(1, len(left) - len(rest) + 1):
        for chosen in itertools.permutations(left, count):
            maps = [module.maps[k] for k in chosen]
            if len({m.in_features for m in maps}) != 1:
                continue
            ours = (sum(m.out_features for m in maps), maps[0].in_features)
            for turned in (False, True):
                if shape == (ours[::-1] if turned else ours):
                    others = tuple(k for k in left if k not in chosen)
                    for more in _filled(module, rest, slots, others):
                        yield (Place(key, chosen, turned), *more)


def _takes_biases(module: Smaller, way: Sequence[Place], slots: Mapping[str, tuple[int, ...]]) -> bool:
    holders = _holders(slots)
    for placed in way:
        holder, _, vector = holders[placed.holder]
        maps = [module.maps[k] for k in placed.maps]
        if vector is None and any(bool(m.bias.detach().any()) for m in maps):
            return False
        if vector is not None and slots[f"{holder}.{vector}"] != (sum(m.out_features for m in maps),):
            return False
    return True


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of a weight, by each of them."""
    by_weight: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        by_weight.setdefault(id(weight), []).append(name)
    return {name: tuple(names) for names in by_weight.values() for name in names}
