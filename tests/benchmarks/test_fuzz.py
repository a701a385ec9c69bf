"""What guides the fuzzer, and what it calls a fault."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch

import thesean
from benchmarks.fuzzing import campaign, trial
from benchmarks.fuzzing.altered import Altered, sources
from benchmarks.fuzzing.reached import Reached, telling
from thesean.errors import ArtifactError


def test_a_chain_is_the_same_folder_each_time_and_each_of_its_numbers_alters_it(tmp_path: Path):
    def written(chain: tuple[int, ...], name: str) -> list[bytes]:
        Altered(chain).write(tmp_path / name)
        return [p.read_bytes() for p in sorted((tmp_path / name).iterdir())]

    assert written((3,), "a") == written((3,), "b") != written((3, 4), "c")
    assert Altered((3, 4)).source == Altered((3,)).source


def test_what_is_altered_stays_a_tree(tmp_path: Path):
    """A name that an earlier number made a list was put into itself."""
    Altered((814, 1824, 2641, 110026, 112400)).write(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "graph.json").read_text("utf-8"))["nodes"]


def test_what_is_new_is_kept_and_altered_further():
    corpus = campaign.Corpus()
    assert corpus.chosen(7) == (7,)
    assert corpus.add((7,), "loaded", {1, 2}) == {1, 2}
    assert corpus.add((8,), "refused: x", {2}) == set()
    assert corpus.add((9,), "refused: x", {2, 3}) == {3}
    assert (corpus.chains, corpus.loaded) == ([(7,), (9,)], [(7,)])
    chosen = {corpus.chosen(n)[:-1] for n in range(100, 140)}
    assert chosen == {(), (7,), (9,)}
    assert corpus.chosen(5) == corpus.chosen(5)


def test_an_outcome_is_of_a_kind_whatever_its_names_and_numbers():
    one, other = "refused: /tmp/x: node 'a' has 3.5e4 of [1, 2]", "refused: /y: node 'b' has 7 of []"
    assert trial.kind(one) == trial.kind(other)
    assert trial.kind("refused: no weight") != trial.kind("refused: no node")


def reached(folders: list[Path]) -> list[set[int]]:
    """In a process of its own: functions stay replaced there."""
    gc.unfreeze()  # what tests have frozen is found again
    found, telling = [], Reached()
    assert telling.watch() > 300
    for folder in folders:
        telling.clear()
        with suppress(ArtifactError):
            thesean.load(folder)
        found.append(telling.pairs)
    return found


def test_pairs_of_branches_tell_one_way_through_the_loader_from_another(tmp_path: Path):
    folder = sources()[0]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        _, once, again, nothing = pool.apply(reached, [[folder, folder, folder, tmp_path]])
    assert once == again
    assert len(once) > len(nothing) > 0
    assert not nothing <= once


def foreign_package(elsewhere: Path) -> None:
    sys.path.insert(0, str(elsewhere))
    import_module("foreign_package")


@pytest.mark.parametrize(
    ("what", "does", "expected"),
    [
        ("a command", lambda elsewhere: os.system("true"), "executed: os.system"),
        ("a file elsewhere", lambda elsewhere: (elsewhere / "x").write_text("x"), "executed: open"),
        ("a package that nothing has used", foreign_package, "executed: import foreign_package"),
        ("gradients off", lambda elsewhere: torch.set_grad_enabled(False), "changed: "),
        ("random numbers", lambda elsewhere: torch.rand(1), "changed: "),
        ("an error of its own", lambda elsewhere: {}["x"], "foreign: load: KeyError"),
        ("a refusal", lambda elsewhere: (_ for _ in ()).throw(ArtifactError("no")), "refused: no"),
    ],
)
def test_what_a_load_may_not_do_is_a_fault(what, does, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a copy of this process, whose watch ends with it."""
    (tmp_path / "foreign_package.py").touch()
    loads = thesean.load

    def load(folder: Path) -> object:
        does(tmp_path)
        return loads(folder)

    monkeypatch.setattr(thesean, "load", load)
    (found,) = campaign.outcomes([(1,)]).values()
    assert found.startswith(expected)


def test_a_process_that_dies_is_told_and_the_next_run_goes_on(monkeypatch: pytest.MonkeyPatch):
    def load(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(thesean, "load", load)
    assert campaign.outcomes([(1,), (2,)]) == {(n,): "died: signal 9, status 0" for n in (1, 2)}


def test_a_call_that_takes_long_is_slow_and_a_load_is_dead(monkeypatch: pytest.MonkeyPatch):
    class Endless:
        def __getattr__(self, name: str) -> object:
            while True:
                pass

    monkeypatch.setattr(campaign, "_SECONDS", 0.2)
    monkeypatch.setattr(thesean, "load", lambda folder: Endless())
    assert campaign.outcomes([(1,)]) == {(1,): "slow: more than 0.2 s after it was loaded"}
    monkeypatch.setattr(thesean, "load", lambda folder: Endless().signature)
    assert campaign.outcomes([(1,)]) == {(1,): "died: signal 27, status 0"}


def test_functions_that_tell_have_the_names_of_those_they_stand_for():
    assert {name for file, name, _ in telling() if file.endswith("thesean/load_artifact.py")} >= {"load", "_load"}
    assert Reached().pairs == set()
