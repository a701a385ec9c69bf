"""What can be known to be wrong before a model is traced, and that warnings point at the caller."""

from __future__ import annotations

from typing import Any

import pytest

import thesean
from tests import models
from tests.models import token_batches, tokens
from thesean import Target
from thesean.choose.constraints import Constraints
from thesean.errors import PlanError, TargetMismatchError, UnknownNameError
from thesean.passes.plan.plan import Plan
from thesean.recipe import RECIPES, RecipeError
from thesean.request import Request


def test_settings_are_resolved_once():
    request = Request(target="auto", constraints={"params": 10}, recipe="fast")
    assert request.settings is RECIPES["fast"]
    assert request.budgets[0] == Constraints(params=10)
    assert request.division["granularity"] == "sublayer"
    assert Request().division["granularity"] is None  # blocks, which nobody asked for by name


def test_a_plan_is_read_from_its_file(tmp_path):
    plan = thesean.plan(models.gpt2(1), "gru", example_inputs=tokens())
    plan.to_yaml(tmp_path / "plan.yaml")
    assert Request(plan=tmp_path / "plan.yaml").edited == plan


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"target": "rn"}, UnknownNameError, "did you mean 'rnn'"),
        ({"target": {"h.0": "keep", "h.1": "gruu"}}, UnknownNameError, "did you mean 'gru'"),
        ({"target": Target("gru", widht=3)}, TargetMismatchError, "option 'widht'"),
        ({"target": 3}, PlanError, "expected a name, a Target"),
        ({"target": "auto"}, PlanError, "needs a budget"),
        ({"constraints": {"params": 3}}, PlanError, "belong to target='auto'"),
        ({"candidates": ["gru"]}, PlanError, "belong to target='auto'"),
        ({"merge": 1.5}, PlanError, "merge: expected a whole number"),
        ({"parts": [3]}, PlanError, "parts: expected globs"),
        ({"plan": 3}, PlanError, "plan: expected a Plan"),
        ({"plan": Plan(parts=()), "merge": 2, "target": "gru"}, PlanError, "leave merge, target out"),
        ({"recipe": {"stepz": 3}}, RecipeError, "stepz"),
        (
            {"target": "auto", "constraints": {"params": 3}, "recipe": {"keep_best": 2}},
            RecipeError,
            "keep_best: target 'auto' finds out itself which parts stay, found 2",
        ),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused_without_a_model(arguments, error, told):
    with pytest.raises(error, match=told):
        Request(**arguments)


@pytest.mark.parametrize("target", ["auto", "rnn"])
def test_two_ways_of_merging_are_refused_for_every_target(target):
    budget: Any = {"constraints": {"params": 10**6}} if target == "auto" else {}
    with pytest.raises(PlanError, match="merge= and target_parts= say the same thing"):
        thesean.plan(models.gpt2(2), target, data=token_batches(), merge=2, target_parts=1, progress=False, **budget)


@pytest.mark.thorough
def test_merging_is_heeded_by_auto():
    candidates, bound = ["keep", "identity"], {"params": 10**6}
    given: Any = dict(
        data=token_batches(), constraints=bound, candidates=candidates, progress=False, granularity="block"
    )
    assert len(thesean.plan(models.gpt2(2), "auto", merge=2, **given)) == 1
    assert len(thesean.plan(models.gpt2(2), "auto", target_parts=1, **given)) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: thesean.compile(
            models.mlp(), "mlp", example_inputs=models.vectors(3, 8), recipe="fast", progress=False
        ),
        lambda: thesean.plan(
            models.mlp(), "auto", example_inputs=models.vectors(3, 8), constraints={"params": 10**6},
            candidates=["keep", "identity"], progress=False,
        ),
        lambda: thesean.compile(
            models.mlp(), "auto", example_inputs=models.vectors(3, 8), constraints={"params": 150}, recipe="fast",
            candidates=["keep", "narrow"], progress=False,
        ),
        lambda: thesean.baseline(
            models.mlp(), "mlp", kind="distillation", example_inputs=models.vectors(3, 8), recipe={"steps": 1},
            progress=False,
        ),
    ],
    ids=["compile", "plan auto", "compile auto", "baseline"],
)  # fmt: skip
def test_a_warning_points_at_whoever_called(call):
    with pytest.warns(UserWarning, match="no data given") as caught:
        call()
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (10**6, r"the guide itself meets the constraints \(at most 1,000,000 parameters\): nothing to convert"),
        (
            100,
            r"can't be met with these candidates .*no less than the guide's own part: linear.* That is the guide: ask",
        ),
    ],
)
def test_a_budget_that_leaves_all_to_the_guide_says_why(params, told):
    given: dict[str, Any] = {"example_inputs": models.vectors(3, 8), "constraints": {"params": params}}
    with pytest.warns(UserWarning, match="no data given"), pytest.raises(PlanError, match=told):
        thesean.compile(models.mlp(), "auto", candidates=["keep", "linear"], recipe="fast", progress=False, **given)
