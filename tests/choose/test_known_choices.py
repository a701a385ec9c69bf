"""Small networks of which the best choice is known.

B batch, D width
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import thesean
from tests.models import vectors
from thesean.choose.latency import PlanTimer
from thesean.choose.quality import Effort, Prober
from thesean.deploy.timing.latency import Timing
from thesean.errors import PlanError

SCALES = (1.0, 0.0, 0.3, 0.1)  # of what each block adds: the best to leave out are the second, the fourth, the third
BLOCK = 2 * 8 * 8 + 2 * 8


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.down.weight.mul_(scale)
            self.down.bias.mul_(scale)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.down(torch.relu(self.up(x_BD)))


def guide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(scale) for scale in SCALES), nn.Linear(8, 3)).eval()


@pytest.fixture(autouse=True)
def _little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(Prober, effort=Effort(part_steps=2, whole_steps=2))
    monkeypatch.setattr("thesean.choose.choose_plan.Prober", few)


def chosen(constraints, **settings):
    data = [vectors(16, 8, seed=k) for k in range(8)]
    return thesean.plan(
        guide(), "auto", data=data, constraints=constraints, candidates=["keep", "identity"], progress=False, **settings
    )  # fmt: skip


def dropped(plan: thesean.Plan) -> set[str]:
    return {p.path for p in plan.replaced}


def total() -> int:
    return sum(p.numel() for p in guide().parameters())


def test_each_budget_leaves_out_what_adds_least():
    plans = chosen([{"params": total() - count * BLOCK} for count in (1, 2, 3)])
    assert isinstance(plans, thesean.Plans)
    assert [dropped(plan) for plan in plans] == [{"1"}, {"1", "3"}, {"1", "2", "3"}]
    assert [c.params for c in plans.constraints] == [total() - count * BLOCK for count in (1, 2, 3)]


def test_a_list_chooses_what_each_budget_alone_does():
    budgets = [{"params": total() - BLOCK}, {"params": total() - 2 * BLOCK}]
    assert list(chosen(budgets)) == [chosen(budget) for budget in budgets]


def test_plans_are_a_sequence_that_prints_what_each_costs():
    plans = chosen([{"params": total() - BLOCK}, {"params": 3}])
    assert len(plans) == 2
    assert list(plans[:1]) == [plans[0]]
    assert plans[-1].notes[0].startswith("warning: the constraints can't be met")
    told = str(plans)
    assert f"at most {total() - BLOCK:,} parameters: 1 of 4 parts replaced" in told
    assert "the nearest one found has 27 parameters of at most 3" in told


def test_candidates_are_probed_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch):
    fitted, before = [], Prober._judged

    def counted(self, tail, numbers):
        fitted.append(tail)
        return before(self, tail, numbers)

    monkeypatch.setattr(Prober, "_judged", counted)
    chosen([{"params": total() - count * BLOCK} for count in (1, 2, 3)])
    assert len(fitted) == len(SCALES)


def test_one_network_has_one_budget():
    with pytest.raises(PlanError, match=r"one network has one budget.*thesean\.plan"):
        thesean.compile(
            guide(), "auto", data=[vectors(4, 8)], progress=False,
            constraints=[{"params": 3}],  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Latencies by rule, in place of a machine's."""
    found = Clock()
    monkeypatch.setattr(PlanTimer, "export", lambda self, bound_plan: None)
    monkeypatch.setattr(PlanTimer, "alone", lambda self, cuts: {key: 0.5 * (key[1] < 0) for key in cuts})
    monkeypatch.setattr(PlanTimer, "measure", lambda self, bound_plans: found.measure(bound_plans))
    monkeypatch.setattr(PlanTimer, "beside_guide", lambda self, path: (found.measure([])[0],) * 2)
    return found


class Clock:
    """The guide takes 10 ms, and 2 less for each part that is left out; by itself one takes 0.5."""

    def __init__(self) -> None:
        self.runs = 0
        self.drift = [1.0]  # what a plan's figures are multiplied by, run after run; the last one stays

    def measure(self, bound_plans):
        now = self.drift[min(self.runs, len(self.drift) - 1)]
        self.runs += bool(bound_plans)
        timing = Timing(median_ms=10.0, p20_ms=9.5, p80_ms=11.0, repeats=9)
        took = [now * (10 - 2 * len(p.plan.replaced)) for p in bound_plans]
        return timing, [replace(timing, median_ms=ms, p20_ms=ms - 0.1, p80_ms=ms + 0.1) for ms in took]


def test_a_sum_over_parts_that_is_wrong_is_corrected_and_not_told(clock):
    """By the parts alone all four have to go for 1.25 times; in truth one."""
    plan = chosen({"speedup": 1.25})
    assert dropped(plan) == {"1"}
    (told,) = [note for note in plan.notes if note.startswith("measured ")]
    assert told.startswith("measured 8 ms (7.9 to 8.1) against the guide's 10 ms")
    assert "the sum over parts contradicts that" in told


def test_one_probing_serves_several_speeds(clock):
    plans = chosen([{"speedup": 1.25}, {"speedup": 1.6}, {"speedup": 2.4}])
    assert [dropped(plan) for plan in plans] == [{"1"}, {"1", "3"}, {"1", "2", "3"}]


def test_a_speed_that_nothing_reaches_says_how_near_the_fastest_comes(clock):
    plan = chosen({"speedup": 100})
    assert dropped(plan) == {"0", "1", "2", "3"}
    assert "the nearest one found has 2 ms of at most 0.1 (5.00 times as fast)" in plan.notes[0]


def test_a_figure_that_the_next_run_contradicts_is_measured_until_two_agree(clock):
    clock.drift = [0.4, 1.0]  # the first run reads 2.5 times too fast
    plan = chosen({"speedup": 1.25})
    assert dropped(plan) == {"1"}
    assert any(note.startswith("measured 8 ms") for note in plan.notes)
    assert not any("contradict each other" in note for note in plan.notes)


def test_a_machine_whose_figures_never_agree_is_told_of(clock):
    clock.drift = [1.0, 0.5, 0.25, 0.125, 0.06, 0.03, 0.015, 0.007]
    plan = chosen({"speedup": 1.25})
    assert any("this machine's figures contradict each other" in note for note in plan.notes)
