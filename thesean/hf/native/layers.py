"""Which entries of a network's lists of layers are left, and what they are called once the others are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layers:
    """`kept`: of lists that lost some, by their paths, the numbers of those that stay; `lengths` is what they had."""

    kept: Mapping[str, tuple[int, ...]]
    lengths: Mapping[str, int]

    def renamed(self, name: str) -> str:
        """ "h.4.weight" is "h.2.weight" where two before it went."""
        for path, numbers in self.kept.items():
            if name.startswith(f"{path}."):
                number, dot, rest = name.removeprefix(f"{path}.").partition(".")
                if number.isdigit() and int(number) in numbers:
                    return f"{path}.{numbers.index(int(number))}{dot}{rest}"
        return name

    def fewer(self, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Configurations with fewer layers: numbers that were a list's length, one or all, and lists of it."""
        if not self.kept:
            return [dict(config)]
        path = next(iter(self.kept))
        length, numbers = self.lengths[path], self.kept[path]
        lists = {
            key: [value[n] for n in numbers]
            for key, value in config.items()
            if isinstance(value, list) and len(value) == length
        }
        keys = [k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool) and v == length]
        choices = [*([key] for key in keys), *([keys] if len(keys) > 1 else [])]
        return [{**config, **lists, **dict.fromkeys(chosen, len(numbers))} for chosen in choices]


def layers_of(model: nn.Module, names: Iterable[str]) -> Layers:
    """`names` of weights, and of what stands in their place, that are left of `model`."""
    names = tuple(names)
    kept: dict[str, tuple[int, ...]] = {}
    lengths: dict[str, int] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in lengths):
            continue
        lengths[path] = len(module)
        left = tuple(k for k in range(len(module)) if any(n.startswith(f"{path}.{k}.") for n in names))
        if left and len(left) < len(module):
            kept[path] = left
    return Layers(kept, lengths)
