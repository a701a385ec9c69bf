from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests import captured, models
from tests.distill.tools import Recorder, batches_of, drafted, recipe, task, training
from thesean.distill.fine_tune import fine_tune
from thesean.errors import NumericalError


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def run(guide, hybrid, what, steps=30, observer=None, batches=None, **settings):
    told = training(guide, what, recipe(steps, **settings), batches=batches, observer=observer)
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
    assert run(guide, hybrid, task(cross_entropy, output="softmax"), 60, learning_rate=1e-2, **settings) == 60
    after = [cross_entropy(hybrid.graph_module(**i), b).item() for b, i in batches]
    assert sum(after) < sum(held)


def test_without_a_task_the_guides_outputs_are_matched():
    guide, observer = captured.gpt2(), Recorder()
    _, hybrid = drafted(guide, "gru")
    run(guide, hybrid, task(logits="softmax"), 15, observer, batches_of(guide, 2, 4), hidden=0.0, learning_rate=3e-3)
    assert observer.losses[-1] < 0.8 * observer.losses[0]


def test_the_guide_stays_and_the_hybrid_ends_in_eval_mode():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    before, own = models.state_of(guide.graph_module), models.state_of(hybrid.graph_module)
    run(guide, hybrid, task(cross_entropy), 3)
    assert models.same_state(guide.graph_module, before)
    assert not models.same_state(hybrid.graph_module, own)
    assert not hybrid.graph_module.training


def weights(steps, **settings):
    """What the task loss and the guide's match weigh at each step, read off by a task loss of known size."""
    guide, observer = captured.mlp(), Recorder()
    _, hybrid = drafted(guide)
    calls: list[int] = []

    def constant(output, batch):
        calls.append(len(calls))
        return output.sum() * 0 + 1000.0

    run(guide, hybrid, task(constant, output="softmax"), steps, observer, learning_rate=1e-9, **settings)
    return observer.losses, len(calls)


def test_distillation_is_annealed_to_nothing():
    losses, _ = weights(10, distillation=0.9, hidden=0.0, anneal_until=0.5)
    # (1 - w) 1000 + w KL, with a KL below 1: w falls from 0.9 by 0.18 a step to 0
    expected = [100, 280, 460, 640, 820, 1000, 1000, 1000, 1000, 1000]
    assert losses == pytest.approx(expected, abs=5)
    assert losses[5:] == [1000.0] * 5


def test_hidden_states_are_annealed_with_it():
    losses, _ = weights(4, distillation=0.0, hidden=1.0, anneal_until=0.5)
    assert losses[0] - 1000 > 1.5 * (losses[1] - 1000) > 0
    assert losses[2:] == [1000.0, 1000.0]


def test_full_distillation_never_asks_for_a_task_that_weighs_nothing():
    _, calls = weights(4, distillation=1.0, hidden=0.0, anneal_until=1.0)
    assert calls == 3  # not in step 0


def test_a_loss_that_is_no_number_is_told():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    with pytest.raises(NumericalError, match="fine-tuning: the loss is nan at step 0"):
        run(guide, hybrid, task(lambda output, batch: output.sum() * float("nan")), 3)


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
    assert run(guide, hybrid, task(cross_entropy), 0) == 0
    assert models.same_state(hybrid.graph_module, before)


def test_dropout_and_batch_norm_of_the_kept_layers_stay_in_eval_mode():
    guide = captured.resnet()
    _, hybrid = drafted(guide, "mlp", keep=["blocks.0", "blocks.1"])
    before = {k: v.clone() for k, v in hybrid.graph_module.named_buffers() if "running" in k}
    run(guide, hybrid, task(cross_entropy), 2, batches=batches_of(guide, 2, 8))
    assert before
    assert all(torch.equal(v, before[k]) for k, v in hybrid.graph_module.named_buffers() if k in before)
