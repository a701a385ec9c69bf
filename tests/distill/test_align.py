"""N examples, P features"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.distill.tools import Recorder, batches_of, drafted, recipe, task, training
from tests.models import vectors
from thesean.distill.align import Aligner, Stage, stages
from thesean.distill.closed_form import solve_parts
from thesean.distill.objective import faint
from thesean.distill.seen import examples
from thesean.errors import DataError, NumericalError
from thesean.targets import Target


def test_progressive_stages_train_all_parts_so_far():
    found = stages("progressive", 3, 10)
    assert [(s.number, s.count, s.trained, s.compared, s.steps) for s in found] == [
        (0, 3, (0,), (0,), 4),
        (1, 3, (0, 1), (0, 1), 3),
        (2, 3, (0, 1, 2), (0, 1, 2), 3),
    ]


def test_sequential_stages_train_one_part_each():
    assert [(s.trained, s.compared, s.steps) for s in stages("sequential", 2, 5)] == [((0,), (0,), 3), ((1,), (1,), 2)]


@pytest.mark.parametrize("schedule", ["joint", "independent"])
def test_joint_and_independent_schedules_have_one_stage(schedule):
    (stage,) = stages(schedule, 3, 10)
    assert stage.trained == stage.compared == (0, 1, 2)
    assert (stage.steps, stage.count) == (10, 1)


@pytest.mark.parametrize("schedule", ["progressive", "sequential", "joint", "independent"])
@pytest.mark.parametrize("steps", [0, 1, 7, 100])
def test_no_step_is_lost(schedule, steps):
    assert sum(s.steps for s in stages(schedule, 3, steps)) == steps


def test_tokens_are_examples_and_so_are_images():
    assert examples(vectors(2, 5, 3)).shape == (10, 3)
    assert examples(vectors(2, 4, 3, 3)).shape == (2, 36)
    assert examples(vectors(2, 3)).shape == (2, 3)
    assert examples(vectors(100, 100, 2)).shape[0] <= 4096


def test_activations_are_faint_when_they_vary_by_less_than_a_step_of_a_weight_moves_them():
    assert faint(1e-10 * vectors(8, 5))
    assert not faint(1e-6 * vectors(8, 5))
    assert not faint(torch.ones(8, 5))  # a part that is constant is a mistake, and told


def aligner(guide, hybrid, settings, observer=None, held_out=None) -> Aligner:
    told = training(guide, task(), settings, held_out=held_out, observer=observer)
    return Aligner(hybrid, told, [inputs for _, inputs in told.feed.batches])


@pytest.mark.thorough
@pytest.mark.parametrize("measure", ["nmse", "cka"])
@pytest.mark.parametrize("schedule", ["progressive", "sequential", "independent", "joint"])
def test_a_stage_never_ends_worse_than_it_began(schedule, measure):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    settings = recipe(12, schedule, share=1.0)
    settings = settings.model_copy(
        update={"alignment": settings.alignment.model_copy(update={"measure": measure, "learning_rate": 1e-2})}
    )
    trainer = aligner(guide, hybrid, settings)
    for stage in stages(schedule, 3, 12):
        result = trainer.run(stage)
        assert result.after <= result.before
        assert trainer.held_out_loss(stage.compared[-1]) == pytest.approx(result.after, rel=1e-4)
        assert result.steps == stage.steps
        assert result.stopped_by == "budget"


def test_training_and_refitting_bring_a_part_nearer():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    result = aligner(guide, hybrid, recipe(20, share=1.0)).run(stages("progressive", 3, 60)[0])
    assert result.after < 0.5 * result.before


@pytest.mark.parametrize(("batches", "checked"), [(4, [0, 8, 16, 24, 30]), (16, [0, 8, 16, 24, 30]), (20, [0, 20, 30])])
def test_held_out_data_is_asked_no_more_often_than_a_refit_has_batches(batches, checked):
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    solving = [inputs for _, inputs in batches_of(guide, batches)]
    told = training(guide, task(), recipe(30, share=1.0, check_every=8))
    result = Aligner(hybrid, told, solving).run(stages("joint", 3, 30)[0])
    assert [step for step, _ in result.curve.held_out] == checked


def test_a_stage_that_the_time_ends_keeps_what_it_reached():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    told = training(guide, task(), recipe(90, share=1.0, check_every=50))
    whole = told.trainer.deadline
    solving = [inputs for _, inputs in batches_of(guide)]
    result = Aligner(hybrid, told.within(0.0), solving).run(stages("joint", 3, 90)[0])
    assert (result.steps, result.stopped_by) == (1, "budget")
    assert [step for step, _ in result.curve.held_out] == [0, 1]
    assert result.curve.kept == 1  # refitted
    assert result.after < result.before
    assert told.trainer.deadline == whole


def test_only_the_parts_of_the_stage_move():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    before, theirs = models.state_of(hybrid.graph_module), models.state_of(guide.graph_module)
    aligner(guide, hybrid, recipe(share=1.0)).run(Stage(number=1, count=3, trained=(1,), compared=(1,), steps=4))
    moved = {k.split(".")[0] for k, v in hybrid.graph_module.state_dict().items() if not torch.equal(v, before[k])}
    assert "part_1" in moved
    assert moved <= {"part_0", "part_1"}  # the refit may touch the parts before, never the guide's own layers
    assert models.same_state(guide.graph_module, theirs)


def test_flags_come_back_and_the_hybrid_is_in_eval_mode():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    hybrid.graph_module.get_parameter("6.weight").requires_grad_(False)
    before = [p.requires_grad for p in hybrid.graph_module.parameters()]
    aligner(guide, hybrid, recipe(share=1.0)).run(stages("progressive", 3, 4)[0])
    assert [p.requires_grad for p in hybrid.graph_module.parameters()] == before
    assert not hybrid.graph_module.training


class Noting(nn.Module):
    """A map that keeps in which mode it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.modes.append(self.training)
        return self.map(x)


def test_parts_stay_in_train_mode_when_held_out_batches_were_looked_at():
    guide = captured.mlp()
    _, hybrid = drafted(guide, Target("noting", build=lambda part: Noting()))
    aligner(guide, hybrid, recipe(share=1.0, check_every=2)).run(stages("joint", 3, 6)[0])
    for r in hybrid.replacements:
        assert hybrid.module(r).modes == [True] * 6


def test_a_part_that_is_good_already_ends_at_the_ceiling_without_a_step():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    settings = recipe(share=1.0)
    easy = settings.model_copy(update={"alignment": settings.alignment.model_copy(update={"ceiling": 10.0})})
    result = aligner(guide, hybrid, easy).run(stages("progressive", 3, 30)[0])
    assert (result.steps, result.stopped_by) == (0, "ceiling")


def test_a_stage_that_gains_nothing_ends_by_its_plateau_and_keeps_the_best():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    solve_parts(guide.graph_module, hybrid, [0, 1, 2], [i for _, i in batches_of(guide)], ridge=1e-3)
    settings = recipe(share=1.0)
    changes = {"learning_rate": 10.0, "patience": 2, "refit": False}  # so high that every step harms
    wild = settings.model_copy(update={"alignment": settings.alignment.model_copy(update=changes)})
    trainer = aligner(guide, hybrid, wild)
    result = trainer.run(Stage(number=0, count=1, trained=(0,), compared=(0,), steps=40))
    assert result.stopped_by == "plateau"
    assert result.steps == 4
    assert result.after == result.before == pytest.approx(trainer.held_out_loss(0), rel=1e-5)


def test_the_observer_is_told_stage_part_and_steps():
    guide, observer = captured.mlp(), Recorder()
    _, hybrid = drafted(guide)
    trainer = aligner(guide, hybrid, recipe(share=1.0), observer)
    for stage in stages("progressive", 3, 6):
        trainer.run(stage)
    assert [p[:4] for p in observer.phases] == [("align", part, k + 1, 3) for k, part in enumerate(hybrid.parts)]
    assert len(observer.losses) == 6


def test_fewer_than_four_examples_for_cka_are_refused_with_the_part():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    settings = recipe(share=1.0)
    by_cka = settings.model_copy(update={"alignment": settings.alignment.model_copy(update={"measure": "cka"})})
    with pytest.raises(DataError, match=r"^0\.\.1: .*4"):
        aligner(guide, hybrid, by_cka, held_out=batches_of(guide, 1, batch=3)).run(stages("progressive", 3, 6)[0])


def test_not_a_number_in_activations_names_the_part():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    with torch.no_grad():
        hybrid.graph_module.part_0.last.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"^0\.\.1: "):
        aligner(guide, hybrid, recipe(share=1.0)).run(stages("progressive", 3, 6)[0])


def test_parts_without_a_weight_that_trains_say_so():
    guide = captured.mlp()
    _, hybrid = drafted(guide, Target("mine", build=lambda part: nn.Identity()))
    found = aligner(guide, hybrid, recipe(4)).run(stages("joint", 3, 4)[0])
    assert (found.steps, found.stopped_by) == (0, "nothing to train")
