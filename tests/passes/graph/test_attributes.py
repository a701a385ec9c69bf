"""What a module keeps is told where it is another, and put back, however deep it lies."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from thesean.passes.graph.attributes import KeptAttributes


class Cache:
    """An object of the caller's, with a table of its own."""

    def __init__(self) -> None:
        self.steps, self.table = 3, torch.arange(4.0)
        self.inner: dict[str, Any] = {"rows": [torch.zeros(2), {"deep": 1}]}


class Keeping(nn.Module):
    """A module with all kinds of attributes, and one inside."""

    def __init__(self, inner: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.count, self.name, self.nothing = 0, "a", None
        self.seen, self.names, self.last = [1, [2, 3]], {"a", "b"}, deque([1, 2], maxlen=2)
        self.pair = (1, [4])
        self.table, self.by_length = torch.arange(3.0), {5: torch.ones(2), "six": {"seven": 8}}
        self.cache = Cache()
        self._hidden, self._box = 1, {"x": [1]}
        if inner:
            self.part = Keeping(inner=False)


# what is done to a module, and the paths that are told of
CHANGES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "nothing": (lambda m: None, []),
    "the same anew": (lambda m: setattr(m, "seen", copy.deepcopy(m.seen)), []),
    "the same table anew": (lambda m: setattr(m, "table", m.table.clone()), []),
    "an equal number": (lambda m: setattr(m, "count", 0), []),
    "the same written": (lambda m: m.table.add_(0), []),
    "a number": (lambda m: setattr(m, "count", 1), ["count"]),
    "a truth for a number": (lambda m: setattr(m, "count", False), ["count"]),
    "something for nothing": (lambda m: setattr(m, "nothing", 0), ["nothing"]),
    "a new one": (lambda m: setattr(m, "more", 1), ["more"]),
    "one that goes": (lambda m: delattr(m, "name"), ["name"]),
    "a list's entry": (lambda m: m.seen.__setitem__(0, 5), ["seen"]),
    "a list within": (lambda m: m.seen[1].append(4), ["seen"]),
    "a longer list": (lambda m: m.seen.append(4), ["seen"]),
    "a list's order": (lambda m: m.seen.reverse(), ["seen"]),
    "a set": (lambda m: m.names.add("c"), ["names"]),
    "a set's name": (lambda m: (m.names.remove("a"), m.names.add("c")), ["names"]),
    "a queue": (lambda m: m.last.append(3), ["last"]),
    "what a tuple holds": (lambda m: m.pair[1].append(3), []),  # which is looked into where it is exchanged
    "a tuple": (lambda m: setattr(m, "pair", (1, [5])), ["pair"]),
    "a table written": (lambda m: m.table.add_(1), ["table"]),
    "a table of another size": (lambda m: setattr(m, "table", torch.arange(4.0)), ["table"]),
    "a table of another dtype": (lambda m: setattr(m, "table", torch.arange(3)), ["table"]),
    "no table": (lambda m: setattr(m, "table", None), ["table"]),
    "no number's place": (lambda m: m.table.__setitem__(1, torch.nan), ["table"]),
    "a table in a dict": (lambda m: m.by_length[5].mul_(2), ["by_length.5"]),
    "a new table in a dict": (lambda m: m.by_length.update({6: torch.ones(1)}), ["by_length.6"]),
    "a table for another": (lambda m: m.by_length.update({5: torch.zeros(2)}), ["by_length.5"]),
    "a dict's dict": (lambda m: m.by_length["six"].update(seven=9), ["by_length.six.seven"]),
    "an object's number": (lambda m: setattr(m.cache, "steps", 4), ["cache.steps"]),
    "an object's table": (lambda m: m.cache.table.zero_(), ["cache.table"]),
    "a table in an object's list": (lambda m: m.cache.inner["rows"][0].fill_(1), ["cache.inner.rows"]),
    "a dict in an object's list": (lambda m: m.cache.inner["rows"][1].update(deep=2), ["cache.inner.rows.deep"]),
    "another object": (lambda m: setattr(m, "cache", changed_cache()), ["cache"]),
    "an equal object": (lambda m: setattr(m, "cache", Cache()), []),
    "what is hidden": (lambda m: setattr(m, "_hidden", 2), ["_hidden"]),
    "what is in a hidden one": (lambda m: m._box["x"].append(2), ["x"]),
    "a part's number": (lambda m: setattr(m.part, "count", 1), ["part.count"]),
    "a part's list": (lambda m: m.part.seen.append(1), ["part.seen"]),
    "a part's table": (lambda m: m.part.cache.table.zero_(), ["part.cache.table"]),
    "two": (lambda m: [m.__setattr__("count", 1), m.part.table.zero_()], ["count", "part.table"]),
    "a parameter, which others look after": (lambda m: m.weight.data.add_(1), []),
}


def changed_cache() -> Cache:
    cache = Cache()
    cache.inner["rows"][0].fill_(7)
    return cache


def held(value: Any) -> Any:
    """By value, for comparison."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.tolist())
    if isinstance(value, dict):
        return {k: held(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [type(value), *map(held, value)]
    if isinstance(value, nn.Module):
        return {k: held(v) for k, v in vars(value).items() if k not in ("_parameters", "_buffers")}
    return held(vars(value)) if isinstance(value, Cache) else value


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_told_by_its_path_and_all_is_put_back(name):
    change, told = CHANGES[name]
    module = Keeping()
    before, objects = held(module), dict(vars(module))
    kept = KeptAttributes(module)
    change(module)
    assert sorted(kept.changed()) == sorted(told)
    kept.restore()
    if name != "what a tuple holds":
        assert held(module) == before
    assert {k: v for k, v in vars(module).items() if v is not objects.get(k)} == {}
    assert kept.changed() == []


def test_what_did_not_change_is_not_touched():
    module = Keeping()
    kept = KeptAttributes(module)
    versions = module.table._version, module.cache.table._version
    module.count = 4
    kept.restore()
    assert (module.table._version, module.cache.table._version) == versions


def test_one_object_in_two_places_is_told_of_where_it_is_met_first_and_a_ring_ends():
    module: Any = Keeping(inner=False)
    module.again = module.cache
    module.cache.owner = module.cache
    module.seen.append(module.seen)
    kept = KeptAttributes(module)
    module.cache.steps = 9
    assert kept.changed() == ["cache.steps"]
    kept.restore()
    assert module.cache.steps == 3
    assert module.again is module.cache


class Comparing:
    """Which says nothing of whether two are alike, or fails."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        raise ValueError("how?")

    __hash__ = None  # type: ignore[assignment]


def test_an_object_that_can_not_be_compared_is_another_one():
    module: Any = nn.Module()
    module.thing = Comparing(1)
    kept = KeptAttributes(module)
    assert kept.changed() == []
    module.thing = Comparing(1)
    assert kept.changed() == ["thing"]
    kept.restore()
    assert kept.changed() == []


def test_what_lies_deeper_than_a_few_levels_is_not_looked_into():
    def nested(depth: int) -> tuple[nn.Module, list[Any]]:
        module, last = nn.Module(), [0]
        held: Any = last
        for _ in range(depth):
            held = [held]
        module.held = held
        return module, last

    for depth, seen in ((2, True), (3, True), (4, False), (9, False)):
        module, last = nested(depth)
        kept = KeptAttributes(module)
        last.append(1)
        assert (kept.changed() == ["held"]) == seen
