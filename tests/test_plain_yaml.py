from __future__ import annotations

import time

import pytest
import yaml

import thesean
from thesean import plain_yaml
from thesean.errors import PlanError
from thesean.recipe import RecipeError


def bomb(levels: int) -> str:
    """Each level names the one before it nine times."""
    rows = [f"a0: &a0 [{', '.join('x' * 9)}]"]
    rows += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join(rows) + "\nparts: []\n"


def as_plan(text: str, tmp_path) -> None:
    with pytest.raises(PlanError, match="the plan is not YAML"):
        thesean.Plan.from_yaml(text)


def as_recipe(text: str, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="is not YAML"):
        thesean.Recipe.from_yaml(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("read", [as_plan, as_recipe])
@pytest.mark.parametrize(
    "text",
    [
        bomb(9), "a: &a 1\nb: *a\n", "a: &a [*a]\n", "a:\n" + "[" * 100_000, "a: " + "{a: " * 40 + "}" * 40 + "\n",
        "a: 2001-01-01\n", "a: 2001-13-45\n", "a: !!int x\n", "a: !!float x\n", "a: !!bool x\n", "a: !!timestamp x\n",
        "a: !!python/name:os.system x\n", "a: !!python/object/apply:os.system [x]\n", "a: !!binary eA==\n",
        "a: !!set {x}\n", f"a: {'1' * 5000}\n", "a: 1\n? [1]\n: 2\n", "a: !!omap [a: 1]\n",
        "a: 1\n<<: {b: 2}\n", "\x00\n",
    ],
    ids=str.__len__,
)  # fmt: skip
def test_what_is_no_plain_value_is_refused_at_once(read, text, tmp_path):
    start = time.monotonic()
    read(text, tmp_path)
    assert time.monotonic() - start < 2  # 4 s and 0.4 GB for 374 bytes of aliases, before


def test_what_is_longer_than_any_plan_is_not_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plain_yaml, "LONGEST", 1000)
    for read in (as_plan, as_recipe):
        read("a: 1\n" + "#" * 1000, tmp_path)
    (tmp_path / "plan.yaml").write_text("a: 1\n" + "#" * 1000)
    with pytest.raises(PlanError, match="at most 1000 characters"):
        thesean.Plan.from_yaml(tmp_path / "plan.yaml")
    assert len(plain_yaml.text_of(tmp_path / "plan.yaml")) == 1001


def test_plain_values_are_read_as_yaml_reads_them():
    text = "a: [1, -2.5, .inf, yes, no, ~, null, 'x', 0x10, {b: [c]}]\nd: |\n  text\n"
    assert plain_yaml.read(text) == yaml.safe_load(text)
    assert plain_yaml.read("") is None
