from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tests.distill.tools import Recorder
from thesean.distill.train import Trainer, constant, cosine
from thesean.errors import NumericalError
from thesean.report import NullObserver


def quadratic(p: nn.Parameter):
    return lambda step, batch: (p - batch).square().sum()


def run(p: nn.Parameter, loss, steps=10, **settings):
    trainer = Trainer(observer=settings.pop("observer", NullObserver()), warmup=1)
    given: Any = {"where": "here", "learning_rate": 0.1} | settings
    return trainer.train([p], loss, itertools.repeat(torch.ones(3)), steps=steps, **given)


def test_the_loss_falls_and_is_told():
    p, observer = nn.Parameter(torch.zeros(3)), Recorder()
    assert run(p, quadratic(p), 30, observer=observer) == 30
    assert observer.steps == list(range(1, 31))
    assert observer.losses[-1] < 0.1 * observer.losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_place_and_step_and_changes_nothing_more(bad):
    p = nn.Parameter(torch.zeros(3))
    seen: list[torch.Tensor] = []

    def loss(step, batch):
        seen.append(p.detach().clone())
        return quadratic(p)(step, batch) * (bad if step == 2 else 1)

    with pytest.raises(NumericalError, match=r"aligning layer3: the loss is (nan|inf) at step 2\. Lower"):
        run(p, loss, where="aligning layer3")
    assert torch.equal(p, seen[-1])


def test_training_stops_when_asked():
    p = nn.Parameter(torch.zeros(3))
    assert run(p, quadratic(p), 10, after=lambda step, loss: step == 4) == 4


def test_frozen_parameters_stay():
    p, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2, 2), requires_grad=False)
    Trainer(observer=NullObserver()).train(
        [p, frozen], quadratic(p), itertools.repeat(torch.ones(3)), steps=3, learning_rate=0.1, weight_decay=0.5,
        where="here",
    )  # fmt: skip
    assert torch.equal(frozen, torch.ones(2, 2))


def test_weight_decay_is_for_matrices_alone():
    bias, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))
    Trainer(observer=NullObserver()).train(
        [bias, matrix], lambda step, batch: (bias.sum() + matrix.sum()) * 0, itertools.repeat(None), steps=3,
        learning_rate=0.1, weight_decay=0.5, where="here",
    )  # fmt: skip
    assert torch.equal(bias, torch.ones(3))
    assert (matrix < 1).all()


def test_the_learning_rate_rises_then_falls_to_a_floor():
    factors = [cosine(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1, abs=0.05)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.03 <= factors[-1] < 0.04


def test_a_single_step_has_a_learning_rate():
    assert 0 < cosine(0, 1, 20) <= 1


def test_a_constant_rate_rises_and_stays():
    factors = [constant(step, 100, 10) for step in range(100)]
    assert factors == pytest.approx([*(k / 10 for k in range(1, 11)), *([1.0] * 90)])
    assert constant(0, 100, 0) == 1


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize(("schedule", "factor"), [("cosine", cosine), ("constant", constant)])
def test_steps_are_those_of_torchs_optimizer_at_the_schedules_rate(name, kind, schedule, factor):
    own, reference = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    trainer = Trainer(observer=NullObserver(), optimizer=name, schedule=schedule, warmup=2, clip=1e6)
    wanted_NP = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    trainer.train(
        [own], quadratic(own), itertools.repeat(wanted_NP), steps=9, learning_rate=0.1, weight_decay=0.5, where="here"
    )
    optimizer = kind([reference], weight_decay=0.5)
    for step in range(9):
        optimizer.param_groups[0]["lr"] = 0.1 * factor(step, 9, 2)
        optimizer.zero_grad()
        quadratic(reference)(step, wanted_NP).backward()
        optimizer.step()
    assert torch.equal(own, reference)


@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_gradients_are_as_long_as_the_clip_lets_them(clip):
    p, lengths = nn.Parameter(torch.zeros(3)), []

    def after(step: int, loss: float) -> bool:
        assert p.grad is not None
        lengths.append(float(p.grad.norm()))
        return False

    trainer = Trainer(observer=NullObserver(), warmup=1, clip=clip)
    given: Any = {"steps": 3, "learning_rate": 0.1, "where": "here", "after": after}

    def steep(step: int, batch: torch.Tensor) -> torch.Tensor:
        return 1000 * quadratic(p)(step, batch)

    trainer.train([p], steep, itertools.repeat(torch.ones(3)), **given)
    assert lengths == pytest.approx([clip] * 3, rel=1e-4)


def test_batches_that_make_a_step_are_the_step_of_all_their_rows():
    x, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12.0)
    found = []
    for sizes in ([12], [6, 6], [2, 7, 3]):
        p = nn.Parameter(torch.ones(3))
        batches = itertools.cycle(zip(x.split(sizes), y.split(sizes), strict=True))
        trainer = Trainer(observer=NullObserver(), warmup=1, accumulate=len(sizes), rows=lambda batch: len(batch[0]))

        def loss(step: int, batch: Any, p: nn.Parameter = p) -> torch.Tensor:
            return (batch[0] @ p - batch[1]).square().mean()

        taken = trainer.train([p], loss, batches, steps=5, learning_rate=0.1, where="here")
        assert taken == 5
        found.append(p.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)
