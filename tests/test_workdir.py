"""plan.yaml, recipe.yaml and converted/ are of one run, and what was trained is kept, whatever happens to the disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thesean
from tests import models
from tests.test_artifact import converted
from tests.test_replace_folder import STOP_AT
from thesean import artifact, scratch, workdir
from thesean.errors import ArtifactError, WriteError
from thesean.recipe import Recipe
from thesean.workdir import Workdir, keep

FAST, PAPER = Recipe.named("fast"), Recipe.named("paper")


def run(folder: Path, recipe: Recipe) -> Workdir:
    return Workdir.prepare(folder, converted().plan, recipe)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_nothing_is_written_before_the_end_and_all_of_it_then(tmp_path: Path):
    begun = run(tmp_path / "a" / "work", FAST)
    begun.check_room(converted().module)
    assert files(tmp_path) == {}
    assert begun.keep(converted()) == ""
    assert {p.name for p in (tmp_path / "a" / "work").iterdir()} == {"plan.yaml", "recipe.yaml", "converted"}
    assert Recipe.from_yaml(tmp_path / "a" / "work" / "recipe.yaml") == FAST
    assert thesean.Plan.from_yaml(tmp_path / "a" / "work" / "plan.yaml") == converted().plan


def test_a_file_where_the_plan_should_be_is_found_before_anything_trains(tmp_path: Path):
    (tmp_path / "plan.yaml").mkdir()
    with pytest.raises(WriteError, match=r"can't write workdir=.*: it is a folder"):
        run(tmp_path, FAST)


def test_a_full_disk_leaves_the_earlier_run_and_the_new_one_elsewhere(tmp_path: Path, monkeypatch):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(work, FAST).keep(converted()) == ""
    (work / "notes.txt").write_text("mine")
    before = files(work)
    save_file = artifact.save_file

    def one_is_full(tensors: Any, path: Path, *given: Any, **named: Any) -> None:
        (full if work in path.parents else save_file)(tensors, path, *given, **named)

    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.setattr(artifact, "save_file", one_is_full)
    told = run(work, PAPER).keep(converted())
    monkeypatch.undo()
    assert files(work) == before
    assert told.startswith(f"not saved: can't write {work / 'converted'}: No space left on device. Free some space")
    found = re.search(r"It was saved elsewhere: thesean\.load\('(.+)'\)\.$", told)
    assert found is not None, told
    assert Path(found[1]).parent.parent == elsewhere
    assert models.same_state(thesean.load(found[1]).module, converted().module.state_dict())


def test_what_can_not_be_saved_anywhere_keeps_its_weights_beside(tmp_path: Path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise ArtifactError("operator x can't be saved.")

    monkeypatch.setattr(artifact, "save", refused)
    told = keep(converted(), tmp_path / "saved")
    found = re.fullmatch(r"not saved: operator x can't be saved\. Its weights are in (.+)\.", told)
    assert found is not None, told
    assert Path(found[1]).parent.parent == tmp_path
    weights, state = load_file(found[1]), converted().module.state_dict()
    assert weights
    assert all(torch.equal(value, state[name]) for name, value in weights.items() if name in state)


def test_where_nothing_can_be_written_at_all_it_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(artifact, "save", full)
    monkeypatch.setattr(artifact, "save_weights", full)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "No other place was found" in keep(converted(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_found_before_anything_trains(tmp_path: Path, monkeypatch):
    begun = run(tmp_path, FAST)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WriteError, match=r"can't write workdir=.*No space left on device: \d+ MiB are needed"):
        begun.check_room(converted().module)
    assert list(tmp_path.iterdir()) == []


# Processes are forked that stop at some line of what is called on the way; only the first of them imports torch.
KILLED = (
    STOP_AT
    + """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from tests.test_artifact import converted
from tests.test_workdir import FAST, PAPER, files, run
from thesean import artifact, replace_folder, scratch, write_file
import thesean
os.fsync = lambda handle: None
root, stride = Path(sys.argv[1]), int(sys.argv[2])
PLACES = {m.__file__ for m in (artifact, replace_folder, scratch, write_file)}

def version(folder):
    kept = {name.removeprefix("converted/") for name in files(folder) if "thesean-" not in name}
    assert kept - {"plan.yaml", "recipe.yaml"} >= {"graph.json", "notes.txt"}, kept
    seed = thesean.load(folder / "converted").report.seed
    if "recipe.yaml" in kept:
        assert thesean.Recipe.from_yaml(folder / "recipe.yaml") == (FAST if seed == 0 else PAPER), seed
    return seed, (folder / "recipe.yaml").exists()

import dataclasses
old = converted()
new = thesean.Converted(old.module, old.signature, old.plan, dataclasses.replace(old.report, seed=1))
line, found, points = 1, set(), 0
while True:
    folder = root / str(line)
    assert run(folder, FAST).keep(old) == ""
    (folder / "converted" / "notes.txt").write_text("mine")
    child = os.fork()
    if child == 0:
        sys.settrace(stop_at(line))
        run(folder, PAPER).keep(new)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.add(version(folder))
    assert run(folder, PAPER).keep(new) == ""
    assert version(folder) == (1, True)
    assert {p.name for p in folder.iterdir()} == {"plan.yaml", "recipe.yaml", "converted"}
    if status == 0:
        break
    line, points = line + stride, points + 1
assert found >= {(0, True), (1, True)}, found
print(points)
"""
)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_anywhere_plan_and_recipe_are_of_the_conversion_that_stands(tmp_path: Path):
    root = Path(thesean.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "17"],
        capture_output=True, text=True, timeout=150, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 30


def test_the_scratch_folder_of_a_run_that_only_looked_is_gone(tmp_path: Path):
    run(tmp_path, FAST)
    assert scratch.scratches(tmp_path / "converted") == []
