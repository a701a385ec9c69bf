from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from benchmarks.suite import ROOT, read_result
from thesean import TheseanError
from thesean.errors import UnknownNameError
from thesean.recipe import RECIPES, Recipe, RecipeError


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_comes_back_from_yaml_as_it_was(name, tmp_path: Path):
    recipe = Recipe.named(name)
    assert recipe.name == name
    path = tmp_path / "recipe.yaml"
    text = recipe.to_yaml(path)
    assert path.read_text(encoding="utf-8") == text
    assert Recipe.from_yaml(path) == recipe


def test_recipes_are_found_by_name_path_object_and_default(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    Recipe(name="mine", steps=3).to_yaml(path)
    assert Recipe.resolve(None) is RECIPES["default"]
    assert Recipe.resolve("fast") is RECIPES["fast"]
    assert Recipe.resolve(path) == Recipe.resolve(str(path)) == Recipe(name="mine", steps=3)
    assert Recipe.resolve(Recipe(steps=4)).steps == 4


def test_the_recipes_are_what_they_were_before_they_were_files():
    named = {name: Recipe(name=name) for name in ("default", "fast", "best", "paper")}
    fast = {"steps": 0, "alignment": {"schedule": "none", "share": 0}, "fine_tuning": {"share": 0}}
    best = {"steps": 2000, "closed_form": {"batches": 64}, "warmup": 100}
    paper = {
        "closed_form": {"enabled": False},
        "alignment": {"schedule": "progressive", "measure": "cka", "share": 0.5, "learning_rate": 2e-3},
        "fine_tuning": {"share": 0.5, "learning_rate": 2e-3, "distillation": 0.0, "hidden": 0.0},
    }
    paper["alignment"] |= {"samples": "examples", "recalibrate": True}  # which weren't settings, or weren't the paper's
    given = {"default": {}, "fast": fast, "best": best, "paper": paper}
    assert {name: Recipe.model_validate({**named[name].model_dump(), **given[name]}) for name in named} == RECIPES


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipes_file_names_the_measurements_that_stand_behind_it(name):
    text = (ROOT / "thesean" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    comments = " ".join(text.replace("#", "").split())
    results = set(re.findall(r"(\w+)\.json", comments))
    assert results
    found = {stem: read_result(ROOT / "benchmarks" / "results" / f"{stem}.json") for stem in results}
    # rows that are named after their file, as in (best.json: "fast, 64 batches")
    for stem, rows in re.findall(r'(\w+)\.json[^():]*: ((?:"[^"]+"(?:, )?)+)', comments):
        names = {case["name"] for case in found[stem]["cases"]}
        assert set(re.findall(r'"([^"]+)"', rows)) <= names, stem
    for page, heading in re.findall(r'(docs/\w+\.md), "([^"]+)"', comments):
        assert f"\n## {heading}\n" in (ROOT / page).read_text(encoding="utf-8")


def test_the_fast_recipe_takes_no_gradient_and_the_papers_aligns_by_cka():
    fast, paper = Recipe.named("fast"), Recipe.named("paper")
    assert fast.steps == 0
    assert fast.closed_form.enabled
    assert (paper.alignment.schedule, paper.alignment.measure) == ("progressive", "cka")
    assert (paper.alignment.samples, paper.alignment.recalibrate) == ("examples", True)
    assert not paper.closed_form.enabled
    assert paper.fine_tuning.distillation == 0


def test_an_unknown_recipe_gives_the_near_name():
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'papr'; did you mean 'paper'\? known: best, default"):
        Recipe.resolve("papr")


def test_settings_left_out_have_their_defaults(tmp_path: Path):
    path = tmp_path / "short.yaml"
    path.write_text("steps: 7\nalignment: {measure: cka}\n")
    recipe = Recipe.from_yaml(path)
    assert (recipe.steps, recipe.alignment.measure) == (7, "cka")
    assert recipe.fine_tuning == Recipe().fine_tuning


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stpes: 7", "stpes: unknown setting .stpes.; did you mean .steps."),
        ("alignment: {shedule: joint}", "alignment.shedule"),
        ("alignment: {schedule: sideways}", "alignment.schedule"),
        ("alignment: {order: sideways}", "alignment.order"),
        (
            "alignment: {order: back-to-front}",
            "alignment: order 'back-to-front' is one of stages: it needs the schedule 'progressive' or",
        ),
        ("{sharded: true, alignment: {schedule: stochastic}}", "sharded: true has no meaning with the alignment's"),
        ("alignment: {schedule: stochastic, inputs: guide}", "alignment: inputs 'guide' has no meaning with"),
        ("alignment: {inputs: both}", "alignment.inputs"),
        ("alignment: {measure: {nmse: 0}}", "alignment.measure.sum.nmse: Input should be greater than 0"),
        ("alignment: {measure: 3}", "alignment.measure.name: Input should be a valid string"),
        ("alignment: {measure: {}}", "alignment.measure"),
        ("alignment: {samples: rows}", "alignment.samples: Input should be 'tokens' or 'examples', found 'rows'"),
        ("alignment: {normalize_rows: 3}", "alignment.normalize_rows"),
        ("alignment: {reduction: max}", "alignment.reduction: Input should be 'sum' or 'mean', found 'max'"),
        ("alignment: {schedule: joint, stage_measures: {h.0: cka}}", ": alignment: stage_measures are of one stage"),
        ("alignment: {schedule: progressive, stage_measures: {0: cka}}", "alignment.stage_measures"),
        ("alignment: {schedule: progressive, stage_measures: {h.0: {cka: 0}}}", "alignment.stage_measures.h.0"),
        ("optimizer: sgd", "optimizer: Input should be 'adamw' or 'adam', found 'sgd'"),
        ("learning_rate_schedule: linear", "learning_rate_schedule: Input should be 'cosine' or 'constant'"),
        ("alignment: {weights: {h.0: -1}}", "alignment.weights.h.0"),
        ("alignment: {output: l2}", "alignment.output"),
        ("alignment: {output_weight: 0}", "alignment.output_weight"),
        ("alignment: {task: -1}", "alignment.task"),
        ("alignment: {swap_from: 1.5}", "alignment.swap_from"),
        ("alignment: {swap_all_at: 0}", "alignment.swap_all_at"),
        ("fine_tuning: {divergence: l2}", "fine_tuning.divergence"),
        ("steps: -1", "steps"),
        ("steps: many", "steps: .*, found 'many'"),
        ("alignment: {shedule: joint}", "alignment.shedule: unknown setting 'shedule'; did you mean 'schedule'"),
        ("retry: {fine_tuning: {hiden: 1}}", "unknown setting 'hiden'; did you mean 'hidden'"),
        ("max_dorp: 1", "max_dorp: unknown setting 'max_dorp'; did you mean 'max_drop'"),
        ("fine_tuning: {learning_rate: 0}", "fine_tuning.learning_rate: Input should be greater than 0, or 'find'"),
        ("alignment: {share: find}", "alignment.share: Input should be a valid number, .*, or 'auto', found 'find'"),
        ("closed_form: {batches: all}", "closed_form.batches: Input should be a valid integer, .*, or 'auto'"),
        ("fine_tuning: {anneal_until: 2}", "fine_tuning.anneal_until"),
        ("positions: drp", "positions"),
        ("- 1", "."),
        ("", "."),
        ("steps: [", "is not YAML"),
    ],
)
def test_wrong_settings_are_named(text, reason, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=reason) as caught:
        Recipe.from_yaml(path)
    assert isinstance(caught.value, TheseanError)


def test_a_recipe_of_an_earlier_version_is_what_it_was(tmp_path: Path):
    """Written before orders, companions and what parts read were settings."""
    later = {"order", "inputs", "weights", "output", "output_weight", "task", "swap_from", "swap_all_at", "recalibrate"}
    later |= {"samples", "normalize_rows", "reduction", "stage_measures"}
    data = yaml.safe_load(Recipe.named("paper").to_yaml())
    data["alignment"] = {k: v for k, v in data["alignment"].items() if k not in later}
    for name in ("optimizer", "learning_rate_schedule"):
        del data[name]
    del data["fine_tuning"]["divergence"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    was = Recipe.named("paper").model_dump()
    was["alignment"] |= {"samples": "tokens", "recalibrate": False}
    assert Recipe.from_yaml(path) == Recipe.model_validate(was)
    assert (Recipe().alignment.reads, Recipe.named("paper").alignment.reads) == ("guide", "hybrid")


def test_sums_and_weights_come_back_from_yaml(tmp_path: Path):
    alignment = {"measure": {"nmse": 1.0, "cka": 0.5}, "weights": {"h.*": 2.0}, "output": "js", "recalibrate": True}
    alignment |= {"stage_measures": {2: "cka", "2": {"nmse": 1.0, "cka": 0.5}}, "samples": "examples"}
    recipe = Recipe.resolve({"alignment": {"schedule": "progressive", "order": "easiest-first", **alignment}})
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert [type(key) for key in recipe.alignment.stage_measures] == [int, str]


def test_settings_may_be_given_as_a_dict():
    assert Recipe.resolve({"steps": 7}) == Recipe(steps=7)
    with pytest.raises(RecipeError, match=r"recipe: step: .*did you mean .steps.\? known: .*, steps, warmup"):
        Recipe.resolve({"step": 7})


@pytest.mark.parametrize("recipe", [5, ["fast"], True])
def test_what_names_no_recipe_is_told(recipe):
    with pytest.raises(
        RecipeError, match=f"expected a Recipe, a dict, a name or a path, found {type(recipe).__name__}"
    ):
        Recipe.resolve(recipe)


def test_a_file_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"can't read the recipe .*No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError):
        Recipe().steps = 3


def test_every_setting_is_in_the_yaml():
    data = yaml.safe_load(Recipe().to_yaml())
    assert set(data) == set(Recipe.model_fields)
    assert set(data["alignment"]) == set(type(Recipe().alignment).model_fields)


def test_steps_are_taken_where_a_recipe_or_what_it_tries_once_more_has_any():
    fast = Recipe.named("fast")
    assert fast.steps == 0
    assert not fast.gradients
    assert not fast.model_copy(update={"max_drop": 0.1}).gradients
    assert fast.model_copy(update={"max_drop": 0.1, "retry": Recipe.named("default")}).gradients
    assert Recipe.named("default").gradients
