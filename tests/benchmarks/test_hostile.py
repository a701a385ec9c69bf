"""The benchmark of hostile inputs sees what it counts: each verdict comes out, and a careless writer is found out."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.hostile import KINDS, counted, inputs_of, total
from benchmarks.hostility import trial
from benchmarks.hostility.kills import Victim, killed
from benchmarks.hostility.trial import CANARY, MINE, VERDICTS, Lost, check, only_typed, tried
from thesean.errors import DataError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def typed(folder: Path) -> None:
    raise DataError("told")


def wordless(folder: Path) -> None:
    raise DataError("")


def foreign(folder: Path) -> None:
    raise KeyError("x")


def crashing(folder: Path) -> None:
    ctypes.string_at(0)


def leaving(folder: Path) -> None:
    torch.set_grad_enabled(False)


def drawing(folder: Path) -> None:
    torch.rand(1)


def removing(folder: Path) -> None:
    (folder / MINE).unlink()


def losing(folder: Path) -> None:
    raise Lost("gone")


def executing(folder: Path) -> None:
    (folder / CANARY).touch()
    raise DataError("told")


@pytest.mark.parametrize(
    ("call", "verdict"),
    [
        (typed, "typed"),
        (lambda folder: None, "right"),
        (only_typed(typed), "typed"),
        (only_typed(lambda folder: None), "wrong"),
        (lambda folder: check(False, "not so"), "wrong"),
        (wordless, "wrong"),
        (leaving, "wrong"),
        (drawing, "wrong"),
        (foreign, "foreign"),
        (crashing, "foreign"),
        (removing, "lost"),
        (losing, "lost"),
        (executing, "executed"),
    ],
)
def test_each_verdict_comes_out(call, verdict):
    assert tried(call)[0] == verdict


def test_what_hangs_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "_SECONDS", 0.2)
    assert tried(lambda folder: time.sleep(60)) == ("foreign", "still running after 0.2 s")


def careless(folder: Path, version: int) -> None:
    (folder / "file").unlink(missing_ok=True)
    time.sleep(0.3)  # nearly all of the time that a fork takes, on a busy machine too
    (folder / "file").write_text(str(version))


def test_a_careless_writer_is_found_out():
    victim = Victim(write=careless, read=lambda folder: int((folder / "file").read_text()), names=frozenset({"file"}))
    assert killed(victim, points=5, seed=0)["lost"] > 0


def test_there_are_three_hundred_inputs_each_with_a_name_of_its_own():
    assert sum(len(inputs_of(kind)) for kind in KINDS) >= 300


def test_rows_of_one_and_of_many_add_up():
    rows: list[dict[str, Any]] = [{"name": "a", "verdict": "typed"}, {"name": "b", **dict.fromkeys(VERDICTS, 2)}]
    assert counted(rows[0]) == {**dict.fromkeys(VERDICTS, 0), "typed": 1}
    assert total(rows) == {**dict.fromkeys(VERDICTS, 2), "typed": 3}
