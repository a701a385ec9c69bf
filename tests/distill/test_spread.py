"""Which rank has which parts, and when: what several processes make of it is in tests/test_ranks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import captured
from tests.distill.tools import drafted, recipe, task, training
from thesean import exchange, ranks
from thesean.distill.masters import Masters
from thesean.distill.spread import Spread, spread
from thesean.passes.plan.hybrid import Hybrid
from thesean.recipe import Recipe


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes itself for the second of two, whom it doesn't call."""
    monkeypatch.setattr(ranks, "_world", ranks.World(2, 1, torch.device("cpu")))


def three_parts() -> Hybrid:
    return drafted(captured.mlp())[1]


def found(hybrid: Hybrid, schedule: str = "independent", sharded: bool = False, **alignment: Any) -> Spread | None:
    made = recipe(8, schedule).model_dump()
    given = {**made, "sharded": sharded, "alignment": {**made["alignment"], **alignment}}
    return spread(hybrid, training(captured.mlp(), task(output="softmax"), Recipe.model_validate(given)))


@pytest.mark.usefixtures("of_two")
def test_a_rank_has_the_weights_of_its_own_parts():
    hybrid = three_parts()
    shared = found(hybrid)
    assert shared is not None
    assert [shared.has(part) for part in range(3)] == [False, True, True]
    assert shared.weights() == hybrid.parameters_of([1, 2])
    weights = hybrid.parameters_of(range(3))
    assert shared.masters(weights).parameters == weights


@pytest.mark.usefixtures("of_two")
def test_of_an_optimizer_s_state_a_rank_takes_up_that_of_its_own_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange, "hand_out", lambda value, owner: None)
    hybrid = three_parts()
    shared = found(hybrid)
    assert shared is not None
    masters = shared.masters(hybrid.parameters_of(range(3)))
    every = torch.optim.AdamW(masters.parameters)
    for parameter in masters.parameters:
        parameter.grad = torch.ones_like(parameter)
    every.step()
    assert set(masters.state_dict()) == set(Masters(hybrid.parameters_of(range(3))).state_dict())
    optimizer = torch.optim.AdamW(masters.parameters)
    masters.kept(optimizer).load_state_dict(every.state_dict())
    own = set(map(id, shared.weights()))
    assert {id(parameter) for parameter in optimizer.state} == own


@pytest.mark.usefixtures("of_two")
@pytest.mark.parametrize(
    "settings",
    [{"schedule": "joint"}, {"schedule": "progressive"}, {"inputs": "hybrid"}, {"inputs": "mixed"}, {"output": "kl"},
     {"task": 0.5}, {"sharded": True}],
    ids=str,
)  # fmt: skip
def test_parts_that_are_not_each_by_itself_are_trained_on_rows(settings: dict[str, Any]):
    assert found(three_parts(), **settings) is None


def test_one_process_and_more_processes_than_parts_train_on_rows(monkeypatch: pytest.MonkeyPatch):
    hybrid = three_parts()
    assert found(hybrid) is None
    for count, spreads in ((3, True), (4, False)):
        monkeypatch.setattr(ranks, "_world", ranks.World(count, 0, torch.device("cpu")))
        assert (found(hybrid) is not None) == spreads


@pytest.mark.usefixtures("of_two")
def test_parts_that_share_a_weight_are_trained_on_rows():
    hybrid = three_parts()
    first, second = (hybrid.module(r) for r in hybrid.replacements[:2])
    (name, weight), *_ = first.named_parameters()
    assert found(hybrid) is not None
    *above, last = name.split(".")
    setattr(second.get_submodule(".".join(above)), last, nn.Parameter(weight.detach()))
    assert found(hybrid) is not None
    setattr(second.get_submodule(".".join(above)), last, weight)
    assert found(hybrid) is None


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("parts", [4, 5, 12])
def test_owners_are_those_whose_share_a_part_is_in(monkeypatch: pytest.MonkeyPatch, count: int, parts: int):
    owners: list[int] = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "_world", ranks.World(count, rank, torch.device("cpu")))
        own = range(parts)[ranks.own_rows(parts)]
        assert ranks.number() == rank
        assert [ranks.owner_of(part, parts) for part in own] == [rank] * len(own)
        owners += own
    assert owners == list(range(parts))
