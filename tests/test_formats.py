"""What version 0.1.0 wrote still loads and means the same: tests/formats/v1, made once by tests/formats/make.py.

A test that fails here says that users' files stopped working. Mend the reader; never the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils import _pytree

import thesean
from tests import models
from thesean.report import read_report
from thesean.targets import targets

V1 = Path(__file__).parent / "formats" / "v1"
CONVERSIONS = sorted(p for p in (V1 / "conversions").iterdir() if p.is_dir())
PLANS = sorted((V1 / "plans").glob("*.yaml"))
RECIPES = sorted((V1 / "recipes").glob("*.yaml"))


def expect_outputs(conversion: thesean.Converted, examples: dict[str, torch.Tensor]) -> None:
    for number in sorted({key.split(".")[0] for key in examples}):
        inputs = {k.split(".", 2)[2]: v for k, v in examples.items() if k.startswith(f"{number}.input.")}
        expected = [examples[f"{number}.output.{k}"] for k in range(sum(f"{number}.output." in e for e in examples))]
        with torch.no_grad():
            found = _pytree.tree_leaves(conversion(**inputs))
        assert expected
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def holds(new: Any, old: Any) -> bool:
    """Whether everything of `old` is in `new`, which may have more fields."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(k in new and holds(new[k], v) for k, v in old.items())
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(holds, new, old))
    return bool(new == old)


@pytest.mark.parametrize("folder", CONVERSIONS, ids=lambda p: p.name)
def test_a_conversion_saved_by_an_earlier_version_still_loads_and_computes_the_same(folder: Path, tmp_path: Path):
    examples = load_file(folder.with_name(f"{folder.name}.safetensors"))
    loaded = thesean.load(folder)
    expect_outputs(loaded, examples)
    again = thesean.load(loaded.save(tmp_path / "again"))
    expect_outputs(again, examples)
    assert again.plan == loaded.plan
    assert again.report == loaded.report
    assert again.signature == loaded.signature
    assert holds(yaml.safe_load(loaded.plan.to_yaml()), yaml.safe_load((folder / "plan.yaml").read_text("utf-8")))
    assert holds(
        json.loads(json.dumps(loaded.report.to_dict())), json.loads((folder / "report.json").read_text("utf-8"))
    )


def test_there_is_a_conversion_of_each_family_of_that_version():
    documents = [json.loads((folder / "graph.json").read_text("utf-8")) for folder in CONVERSIONS]
    saved = {module["target"] for document in documents for module in document["modules"].values()}
    assert saved <= set(targets())
    assert {
        "conv-1d", "conv-2d", "delta", "elman", "gru", "identity", "linear", "linear-attention", "lstm", "mingru",
        "mixer", "mlp", "narrow", "narrow-heads", "reservoir", "resnet-block", "ssm",
    } == saved  # conv, copy and rnn choose among these  # fmt: skip


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_a_plan_of_an_earlier_version_still_loads_and_is_written_as_it_was(path: Path):
    plan = thesean.Plan.from_yaml(path)
    assert holds(yaml.safe_load(plan.to_yaml()), yaml.safe_load(path.read_text("utf-8")))
    assert thesean.Plan.from_yaml(plan.to_yaml()) == plan
    assert str(plan)


def test_the_plans_fill_each_of_their_fields():
    plans = [yaml.safe_load(path.read_text("utf-8")) for path in PLANS]
    rows = [row for plan in plans for row in plan["parts"]]
    assert all(any(row[key] for row in rows) for key in ("options", "scope", "members", "keeps", "replaces"))
    assert all(any(plan[key] for plan in plans) for key in ("sizes", "latencies", "notes", "candidates"))
    assert any(row["new_latency_ms"] for row in rows)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["merged-and-edited", "copies"])
def test_a_plan_of_an_earlier_version_can_still_be_compiled(name):
    plan = thesean.Plan.from_yaml(V1 / "plans" / f"{name}.yaml")
    guide, data = models.gpt2(4, 8), models.token_batches()
    converted = thesean.compile(guide, data=data, plan=plan, recipe="fast", progress=False)
    assert [(p.path, p.target, p.members) for p in converted.plan] == [(p.path, p.target, p.members) for p in plan]
    assert converted(models.tokens(2, 7)).logits.shape == (2, 7, models.VOCABULARY)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_of_an_earlier_version_still_loads_and_is_written_as_it_was(path: Path):
    recipe = thesean.Recipe.from_yaml(path)
    assert holds(yaml.safe_load(recipe.to_yaml()), yaml.safe_load(path.read_text("utf-8")))


def test_a_report_of_an_earlier_version_still_loads():
    report = read_report(V1 / "report.json")
    assert [row["name"] for row in report["rows"]] == ["guide", "converted"]
    assert report["rows"][1]["latency_ms"].keys() == {"prefill_16", "token_16"}
    assert report["stages"][0]["stopped_by"] == "solved"
    assert report["environment"]["python"] == "3.11"
