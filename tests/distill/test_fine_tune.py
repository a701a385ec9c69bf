from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from tests import captured, models
from tests.distill.tools import Recorder, batches_of, drafted, recipe, task, training
from thesean.curve import Curve
from thesean.distill.averaged import Averaged
from thesean.distill.fine_tune import fine_tune, patience
from thesean.errors import NumericalError
from thesean.targets import Target


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def run(guide, hybrid, what, steps=30, observer=None, batches=None, held_out=None, **settings):
    told = training(guide, what, recipe(steps, **settings), batches=batches, held_out=held_out, observer=observer)
    return fine_tune(hybrid, told, steps)


@pytest.mark.parametrize(
    "settings", [{}, {"distillation": 0.0, "hidden": 0.0}, {"distillation": 1.0, "anneal_until": 1.0}]
)
def test_the_task_loss_falls(settings):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    batches = batches_of(guide)
    held = [cross_entropy(hybrid.graph_module(**i), b).item() for b, i in batches]
    # with full distillation the task comes in as the guide's weight is annealed
    assert run(guide, hybrid, task(cross_entropy, output="softmax"), 60, learning_rate=1e-2, **settings).steps == 60
    after = [cross_entropy(hybrid.graph_module(**i), b).item() for b, i in batches]
    assert sum(after) < sum(held)


def test_without_a_task_the_guides_outputs_are_matched():
    guide, observer = captured.gpt2(), Recorder()
    _, hybrid = drafted(guide, "gru")
    run(guide, hybrid, task(logits="softmax"), 15, observer, batches_of(guide, 2, 4), hidden=0.0, learning_rate=3e-3)
    assert observer.losses[-1] < 0.8 * observer.losses[0]
    assert [list(values) for values in observer.ends] == [["held out"]]


def test_the_guide_stays_and_the_hybrid_ends_in_eval_mode():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    before, own = models.state_of(guide.graph_module), models.state_of(hybrid.graph_module)
    run(guide, hybrid, task(cross_entropy), 3)
    assert models.same_state(guide.graph_module, before)
    assert not models.same_state(hybrid.graph_module, own)
    assert not hybrid.graph_module.training


def weights(steps, batches=None, **settings):
    """What the task loss and the guide's match weigh at each step, read off by a task loss of known size."""
    guide, observer = captured.mlp(), Recorder()
    _, hybrid = drafted(guide)
    calls: list[int] = []

    def constant(output, batch):
        if output.requires_grad:  # asked for by a step, and not by what is held out
            calls.append(len(calls))
        return output.sum() * 0 + 1000.0

    batches = batches or batches_of(guide, steps)  # as many as there are steps: none comes twice
    run(guide, hybrid, task(constant, output="softmax"), steps, observer, batches, learning_rate=1e-9, **settings)
    return observer.losses, len(calls)


def test_distillation_is_annealed_to_nothing():
    losses, _ = weights(10, distillation=0.9, hidden=0.0, anneal_until=0.5)
    # (1 - w) 1000 + w KL, with a KL below 1: w falls from 0.9 by 0.18 a step to 0
    expected = [100, 280, 460, 640, 820, 1000, 1000, 1000, 1000, 1000]
    assert losses == pytest.approx(expected, abs=5)
    assert losses[5:] == [1000.0] * 5


@pytest.mark.parametrize("way", ["pass after pass", "in one pass", "rows in another order"])
def test_it_is_annealed_by_what_is_new(way):
    some = batches_of(captured.mlp(), 4)
    if way == "in one pass":
        some = 3 * some
    elif way == "rows in another order":
        some += [(whole, {name: x.flip(0) for name, x in inputs.items()}) for whole, inputs in some[::-1]]
    losses, _ = weights(10, some, distillation=0.9, hidden=0.0, anneal_until=0.5)
    assert losses == pytest.approx([100, 280, 460, *[640] * 7], abs=5)


def test_half_new_batches_anneal_half_as_much():
    guide = captured.mlp()
    (x,) = (batch[1] for batch in batches_of(guide, 1))
    some = batches_of(guide, 3)
    for _, inputs in some[1:]:
        for name, value in inputs.items():
            value[:8] = x[name][:8]
    losses, _ = weights(5, some, distillation=0.9, hidden=0.0, anneal_until=1.0)
    assert losses == pytest.approx([100, 190, 280, 280, 280], abs=5)


def test_it_is_annealed_on_everything_or_never_where_it_is_told_so():
    some = batches_of(captured.mlp(), 2)
    losses, _ = weights(4, some, distillation=0.9, hidden=0.0, anneal_until=1.0, anneal_on="all")
    assert losses == pytest.approx([100, 325, 550, 775], abs=5)
    losses, _ = weights(4, distillation=0.9, hidden=0.0, anneal_until=None)
    assert losses == pytest.approx([100] * 4, abs=5)


@pytest.mark.parametrize(
    ("count", "loss", "settings", "told"),
    [
        (6, cross_entropy, {}, False),
        (5, cross_entropy, {}, True),
        (5, None, {}, False),
        (5, cross_entropy, {"anneal_on": "all"}, False),
        (5, cross_entropy, {"anneal_until": None}, False),
        (5, cross_entropy, {"distillation": 0.0, "hidden": 0.0}, False),
    ],
)
def test_examples_that_come_again_are_told_where_they_decide_anything(count, loss, settings, told):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    what = task(loss, output="softmax")
    notes = run(guide, hybrid, what, 6, batches=batches_of(guide, count), learning_rate=1e-3, **settings).notes
    assert [note for note in notes if "were new" in note] == (
        ["fine-tune: 5 of 6 batches were new, so that the guide stayed in the loss longer"] if told else []
    )


def test_hidden_states_are_annealed_with_it():
    losses, _ = weights(4, distillation=0.0, hidden=1.0, anneal_until=0.5)
    assert losses[0] - 1000 > 1.5 * (losses[1] - 1000) > 0
    assert losses[2:] == [1000.0, 1000.0]


def test_full_distillation_never_asks_for_a_task_that_weighs_nothing():
    _, calls = weights(4, distillation=1.0, hidden=0.0, anneal_until=1.0)
    assert calls == 3  # not in step 0


def value_on(hybrid, batches):
    return sum(cross_entropy(hybrid.graph_module(**i), b).item() for b, i in batches) / len(batches)


def test_a_rate_that_does_harm_leaves_the_state_that_it_began_with_and_says_so():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    held_out = batches_of(guide, 6, seed=7)
    before, started = models.state_of(hybrid.graph_module), value_on(hybrid, held_out)
    tuned = run(guide, hybrid, task(cross_entropy), 12, held_out=held_out, learning_rate=10.0)
    assert tuned.steps == 12
    again = "fine-tune: 4 of 12 batches were new, so that the guide stayed in the loss longer"
    assert tuned.notes == ("fine-tune did not help: kept the state that it began with", again)
    assert models.same_state(hybrid.graph_module, before)
    (curve,) = tuned.curves
    assert curve.kept == 0
    assert curve.held_out[0] == (0, pytest.approx(value_on(hybrid, [held_out[k] for k in (0, 2, 3, 5)]), rel=1e-5))
    assert min(value for _, value in curve.held_out[1:]) > started


def test_what_helped_on_the_few_batches_that_choose_but_not_on_all_is_taken_back():
    guide = captured.mlp()
    _, hybrid = drafted(guide, Target("mlp", hidden_norm="layer"))
    fitted, others = batches_of(guide, 4), batches_of(guide, 30, seed=9)
    alone = {"distillation": 0.0, "hidden": 0.0}
    run(guide, hybrid, task(cross_entropy), 120, batches=others, held_out=others, learning_rate=1e-2, **alone)
    before, held_out = models.state_of(hybrid.graph_module), [*fitted, *others]
    tuned = run(guide, hybrid, task(cross_entropy), 40, batches=fitted, held_out=held_out, learning_rate=3e-3, **alone)
    (curve,) = tuned.curves
    assert curve.kept > 0  # the few were learnt by heart
    assert tuned.notes
    assert models.same_state(hybrid.graph_module, before)


def test_the_best_state_seen_is_kept_and_not_the_last_one():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    batches, other = batches_of(guide, 2), batches_of(guide, 2, seed=3)
    held = [(a, i) for (a, i) in other]
    tuned = run(guide, hybrid, task(cross_entropy), 60, batches=batches, held_out=held, learning_rate=2e-2)
    (curve,) = tuned.curves
    best = min(value for _, value in curve.held_out)
    assert value_on(hybrid, held) == pytest.approx(best, rel=1e-5)
    assert dict(curve.held_out)[curve.kept] == best < curve.held_out[-1][1]


def test_without_a_loss_the_divergence_decides():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    told = training(guide, task(output="softmax"), recipe(30, learning_rate=10.0))
    before = told.judge(hybrid.graph_module).divergence
    assert fine_tune(hybrid, told, 30).notes
    assert told.judge(hybrid.graph_module).divergence == before


def test_the_highest_rate_that_gains_is_found_by_training_at_it(monkeypatch: pytest.MonkeyPatch):
    guide, observer = captured.mlp(), Recorder()
    _, hybrid = drafted(guide)
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (30.0, 10.0, 1e-3, 1e-6))
    tuned = run(guide, hybrid, task(output="softmax"), 100, observer, learning_rate="find")
    assert tuned.steps == 100 == len(observer.losses)
    assert [c.learning_rate for c in tuned.curves] == [30.0, 10.0, 1e-3]
    *hasty, last = tuned.curves
    assert [c.steps for c in hasty] == [7, 6]  # 7 % of what was left
    assert [c.kept for c in hasty] == [0, 0]
    assert len({c.held_out[0] for c in tuned.curves}) == 1  # each from the best state so far, the start
    assert last.kept > 0


def test_a_rate_that_gains_at_first_is_left_with_what_it_gained(monkeypatch: pytest.MonkeyPatch):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    values = iter([2.0, *[1.5] * 2, *[3.0] * 40])  # the start, a gain, and then nothing but harm
    monkeypatch.setattr("thesean.distill.fine_tune._Tuner.check", lambda self: next(values))
    monkeypatch.setattr("thesean.distill.fine_tune.average_of", lambda steps: None)
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (1e-3, 1e-4))
    tuned = run(guide, hybrid, task(output="softmax"), 100, learning_rate="find")
    first, second = tuned.curves
    assert (first.kept, first.steps) == (5, 15)
    assert second.held_out[0] == (0, 1.5)
    assert second.steps == 85  # the last rate has no other to make room for


@pytest.mark.parametrize(("left", "steps"), [(1, 3), (33, 3), (100, 7), (250, 25), (500, 75), (1000, 150)])
def test_many_steps_bear_more_patience_with_a_rate(left: int, steps: int):
    assert patience(left) == steps


def test_a_rate_has_to_gain_on_where_it_took_the_network_up(monkeypatch: pytest.MonkeyPatch):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    values = iter([2.0, 1.5, 1.5, 3.0, 3.0, *[1.8] * 40])  # a gain and harm at the first rate, then less than the gain
    monkeypatch.setattr("thesean.distill.fine_tune._Tuner.check", lambda self: next(values))
    monkeypatch.setattr("thesean.distill.fine_tune.average_of", lambda steps: None)
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (1e-3, 1e-4, 1e-5))
    tuned = run(guide, hybrid, task(output="softmax"), 100, learning_rate="find")
    assert [(c.learning_rate, c.kept, c.steps) for c in tuned.curves] == [(1e-3, 5, 15), (1e-4, 0, 6), (1e-5, 0, 79)]


def test_a_rate_whose_mean_gains_goes_on_though_the_network_itself_does_not(monkeypatch: pytest.MonkeyPatch):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    looks = (value for k in range(99) for value in (3.0, 1.9 - 0.01 * k))  # the network as it is, and the mean of steps
    values = itertools.chain([2.0], looks)
    monkeypatch.setattr("thesean.distill.fine_tune._Tuner.check", lambda self: next(values))
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (1e-3, 1e-4))
    (curve,) = run(guide, hybrid, task(output="softmax"), 240, learning_rate="find").curves
    assert curve.steps == curve.kept == 240
    assert curve.held_out[-1][1] == min(value for _, value in curve.held_out)


def test_the_mean_of_steps_is_kept_where_it_does_best(monkeypatch: pytest.MonkeyPatch):
    guide, means = captured.mlp(), []
    _, hybrid = drafted(guide)
    values, own = iter([2.0, *[3.0, 1.0], *[3.0, 3.0] * 30]), Averaged.standing_in

    @contextmanager
    def standing_in(self: Averaged) -> Iterator[None]:
        with own(self):
            means.append(models.state_of(hybrid.graph_module))
            yield

    monkeypatch.setattr("thesean.distill.fine_tune._Tuner.check", lambda self: next(values))
    monkeypatch.setattr(Averaged, "standing_in", standing_in)
    run(guide, hybrid, task(output="softmax"), 240, learning_rate=1e-3)
    assert models.same_state(hybrid.graph_module, means[0])


def test_rates_that_did_nothing_before_are_not_tried_again_unless_they_would_be_given_more(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (1e-2, 1e-3, 1e-4))
    tried = [
        Curve(phase="trial", part=None, learning_rate=rate, steps=steps, every=1, losses=(), held_out=(), kept=kept)
        for rate, steps, kept in ((1e-2, 3, 0), (1e-3, 3, 3), (1e-4, 3, 0))
    ]
    for steps, first in ((30, 1e-3), (100, 1e-2)):
        guide = captured.mlp()
        told = training(guide, task(output="softmax"), recipe(steps, learning_rate="find"))
        tuned = fine_tune(drafted(guide)[1], told, steps, tried=tried)
        assert tuned.curves[0].learning_rate == first


def test_a_network_ahead_of_its_guide_is_taught_by_the_task_alone():
    guide, observer = captured.mlp(), Recorder()
    _, hybrid = drafted(guide)
    ahead = []

    def loss(output, batch):
        mine = output.requires_grad
        ahead.append(mine)
        return output.sum() * 0 + (1000.0 if mine or len(ahead) < 2 else 900.0)  # the guide is judged first

    held_out = batches_of(guide, 1)
    run(guide, hybrid, task(loss, output="softmax"), 4, observer, held_out=held_out, learning_rate=1e-9)
    assert observer.losses == [1000.0] * 4  # no tenth of it, as the first step is of a network that is behind


def test_a_rate_at_which_the_loss_is_no_number_makes_room(monkeypatch: pytest.MonkeyPatch):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    monkeypatch.setattr("thesean.distill.fine_tune.RATES", (1e30, 1e-3))
    tuned = run(guide, hybrid, task(output="softmax"), 80, learning_rate="find")
    assert [c.learning_rate for c in tuned.curves] == [1e30, 1e-3]
    assert tuned.curves[-1].kept > 0


def test_a_loss_that_is_no_number_is_told():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    with pytest.raises(NumericalError, match="fine-tuning: the loss is nan at step 0"):
        run(guide, hybrid, task(lambda output, batch: output.sum() * (float("nan") if output.requires_grad else 0)), 3)


def test_the_phase_is_told():
    guide, observer = captured.mlp(), Recorder()
    _, hybrid = drafted(guide)
    run(guide, hybrid, task(cross_entropy), 3, observer)
    assert observer.phases == [("fine-tune", None, 1, 1, 3)]
    assert len(observer.losses) == 3


def test_no_steps_change_nothing():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    before = models.state_of(hybrid.graph_module)
    assert run(guide, hybrid, task(cross_entropy), 0).steps == 0
    assert models.same_state(hybrid.graph_module, before)


def test_dropout_and_batch_norm_of_the_kept_layers_stay_in_eval_mode():
    guide = captured.resnet()
    _, hybrid = drafted(guide, "mlp", keep=["blocks.0", "blocks.1"])
    before = {k: v.clone() for k, v in hybrid.graph_module.named_buffers() if "running" in k}
    run(guide, hybrid, task(cross_entropy), 2, batches=batches_of(guide, 2, 8))
    assert before
    assert all(torch.equal(v, before[k]) for k, v in hybrid.graph_module.named_buffers() if k in before)
