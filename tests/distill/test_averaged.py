from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from thesean.distill.averaged import Averaged, average_of
from thesean.distill.masters import Masters
from thesean.distill.train import Trainer
from thesean.report import NullObserver


def moved(average: Averaged, weight: nn.Parameter, values: list[float]) -> None:
    average.begin(Masters([weight]))
    for value in values:
        with torch.no_grad():
            weight.fill_(value)
        average.add()


def within(average: Averaged, weight: nn.Parameter) -> float:
    with average.standing_in():
        return float(weight.detach()[0])


def test_of_few_steps_it_is_their_mean_without_the_start():
    average, weight = Averaged(), nn.Parameter(torch.full((3,), 100.0))
    moved(average, weight, [1.0, 2.0, 6.0])
    assert within(average, weight) == pytest.approx(3.0)
    assert torch.equal(weight, torch.full((3,), 6.0))


def test_of_many_steps_the_latest_twenty_count():
    average, weight = Averaged(), nn.Parameter(torch.zeros(3))
    values = [float(k % 7) for k in range(60)]
    moved(average, weight, values)
    wanted = 0.0
    for step, value in enumerate(values, 1):
        wanted += max(0.05, 1 / step) * (value - wanted)
    assert within(average, weight) == pytest.approx(wanted, rel=1e-5)


def test_weights_of_half_precision_are_averaged_as_their_masters_are():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average, masters = Averaged(), Masters([weight])
    average.begin(masters)
    for value in (1.0, 1.0078125, 1.015625):  # as near as bf16 has them
        with torch.no_grad():
            masters.parameters[0].fill_(value)
        masters.write()
        average.add()
    assert within(average, weight) == 1.0078125
    assert torch.equal(weight, torch.full((3,), 1.015625, dtype=torch.bfloat16))
    assert float(masters.parameters[0].detach()[0]) == 1.015625


def test_the_trainer_tells_it_of_every_step():
    weight, seen = nn.Parameter(torch.zeros(3)), []

    def loss(step: int, batch: torch.Tensor) -> torch.Tensor:
        seen.append(float(weight.detach()[0]))
        return (weight - batch).square().sum()

    average = Averaged()
    Trainer(observer=NullObserver(), warmup=1, average=average).train(
        [weight], loss, itertools.repeat(torch.ones(3)), steps=4, learning_rate=0.1, where="here"
    )
    after = [*seen[1:], float(weight.detach()[0])]
    assert average.steps == 4
    assert within(average, weight) == pytest.approx(sum(after) / 4, rel=1e-5)


def test_its_state_is_that_of_the_steps_so_far():
    weight, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    average, resumed = Averaged(), Averaged()
    moved(average, weight, [1.0, 2.0, 3.0])
    resumed.begin(Masters([other]))
    resumed.load_state_dict(average.state_dict())
    for each, own in ((average, weight), (resumed, other)):
        with torch.no_grad():
            own.fill_(9.0)
        each.add()
    assert within(average, weight) == within(resumed, other)


def test_a_short_run_has_no_mean():
    assert average_of(239) is None
    assert average_of(240) is not None
