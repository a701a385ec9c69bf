from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests import captured, models
from tests.distill.tools import Recorder, recipe, task, training
from thesean.distill.baselines import baseline_recipe, train_baseline
from thesean.errors import DataError, UnknownNameError
from thesean.passes.plan.make_plan import make_plan
from thesean.recipe import Recipe
from thesean.targets.shared.sequence import SmallLinear


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def test_a_baseline_spends_all_steps_end_to_end():
    scratch = baseline_recipe("scratch", Recipe.named("default"))
    assert scratch.steps == Recipe.named("default").steps
    tuning = scratch.fine_tuning
    assert (tuning.share, tuning.hidden, tuning.distillation) == (1.0, 0.0, 0.0)
    assert scratch.name == "scratch"


def test_distillation_keeps_the_recipes_weight_and_has_one_where_the_recipe_has_none():
    assert baseline_recipe("distillation", Recipe.named("default")).fine_tuning.distillation == 0.9
    assert baseline_recipe("distillation", Recipe.named("paper")).fine_tuning.distillation == 0.9
    mild = recipe(distillation=0.4)
    assert baseline_recipe("distillation", mild).fine_tuning.distillation == 0.4


@pytest.mark.parametrize("wrong", [0, -0.1, float("inf"), float("nan"), "fast"])
def test_a_learning_rate_that_is_none_is_refused(wrong):
    with pytest.raises(DataError, match="learning_rate: expected a number above 0, found"):
        baseline_recipe("scratch", recipe(), wrong)


def test_the_learning_rate_is_the_recipes_unless_given():
    assert baseline_recipe("scratch", recipe(learning_rate=0.5)).fine_tuning.learning_rate == 0.5
    assert baseline_recipe("scratch", recipe(learning_rate=0.5), 0.1).fine_tuning.learning_rate == 0.1


def test_an_unknown_baseline_gives_the_near_name():
    with pytest.raises(UnknownNameError, match="unknown baseline 'scratsh'; did you mean 'scratch'"):
        baseline_recipe("scratsh", Recipe())  # type: ignore[arg-type]


def test_from_scratch_without_a_task_is_refused():
    bound_plan = make_plan(captured.mlp(), "mlp")
    with pytest.raises(DataError, match="pass loss="):
        train_baseline(bound_plan, training(captured.mlp(), task(), recipe(2)), "scratch")


@pytest.mark.parametrize("kind", ["scratch", "distillation"])
def test_a_baseline_starts_without_a_weight_of_the_guide_and_learns(kind):
    guide, observer = captured.mlp(), Recorder()
    bound_plan = make_plan(guide, "mlp")
    settings = baseline_recipe(kind, recipe(0), 1e-2)
    torch.manual_seed(0)
    untrained = train_baseline(bound_plan, training(guide, task(cross_entropy), settings), kind)
    assert untrained.steps == 0
    guides = dict(guide.graph_module.named_parameters())
    head = untrained.hybrid.graph_module.get_parameter("6.weight")
    assert not torch.isclose(head, guides["6.weight"]).all()
    last = [m.weight for m in untrained.hybrid.graph_module.modules() if isinstance(m, SmallLinear)]
    assert last, "else this says nothing"
    for weight in last:  # as torch draws it, uniform up to the inverse root of the inputs, and not as a conversion's
        assert float(weight.detach().abs().max()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)

    before = models.state_of(guide.graph_module)
    settings = baseline_recipe(kind, recipe(20), 1e-2)
    told = training(guide, task(cross_entropy, output="softmax"), settings, observer=observer)
    assert train_baseline(bound_plan, told, kind).steps == 20
    assert observer.phases[-1][0] == kind
    assert models.same_state(guide.graph_module, before)
    if kind == "scratch":
        assert observer.losses[-1] < observer.losses[0]
