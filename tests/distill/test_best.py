from __future__ import annotations

import pytest
import torch
from torch import nn

from thesean.distill.best import Best
from thesean.errors import DataError


def at(modules: list[nn.Module], value: float) -> list[nn.Module]:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.fill_(value)
    return modules


def values(modules: list[nn.Module]) -> set[float]:
    return {v for m in modules for p in m.parameters() for v in p.flatten().tolist()}


def made() -> list[nn.Module]:
    return [nn.Linear(2, 3), nn.Linear(1, 1)]


def test_the_lowest_value_and_its_state_are_kept_and_given_back():
    modules = made()
    best = Best(modules)
    offers = [(3.0, True), (4.0, False), (2.0, True), (2.0, False), (float("nan"), False), (1.0, True), (5.0, False)]
    for step, (value, kept) in enumerate(offers):
        at(modules, value)
        assert best.offer(value, step) is kept
    assert (best.value, best.step) == (1.0, 5)
    at(modules, 7.0)
    best.restore()
    assert values(modules) == {1.0}
    at(modules, 8.0)  # what was given back is a copy
    best.restore()
    assert values(modules) == {1.0}


def test_what_was_best_comes_back_with_a_checkpoint():
    modules = made()
    best, again = Best(modules), Best(made())
    at(modules, 2.0)
    best.offer(2.0, 4)
    again.load_state_dict(best.state_dict())
    assert (again.value, again.step) == (2.0, 4)
    assert not again.offer(2.5, 5)
    again.restore()
    assert values(list(again.modules)) == {2.0}
    nothing = Best(made())
    nothing.load_state_dict(Best(modules).state_dict())
    assert nothing.offer(9.0)


def test_where_no_value_was_a_number_it_is_said():
    best = Best(made())
    best.offer(float("nan"))
    with pytest.raises(DataError, match="was never a number"):
        best.restore()
