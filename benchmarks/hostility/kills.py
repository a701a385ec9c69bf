"""A process that is killed at a random moment of a write: the old or the new stands, whole, the user's files too, and
the next write of that name leaves nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import thesean
from benchmarks.hostility.paths import onnx_file
from benchmarks.hostility.saved import converted
from benchmarks.hostility.trial import MINE, VERDICTS
from thesean import replace_folder
from thesean.deploy.session import Session
from thesean.recipe import Recipe
from thesean.workdir import Workdir
from thesean.write_file import write_text

Counts = dict[str, int]

_RECIPES = (Recipe.named("fast"), Recipe.named("paper"))


@dataclass(frozen=True, kw_only=True)
class Victim:
    """What is killed: `write(folder, 1)` over what `write(folder, 0)` has made. `read` says which of them stands, and
    raises for anything else. `names`: all that may be in the folder at the end.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    names: frozenset[str]
    notes: str = ""  # the folder inside which the user keeps some


def save(folder: Path, version: int) -> None:
    converted(version).save(folder / "saved")


def saved(folder: Path) -> int:
    return thesean.load(folder / "saved").report.seed


def save_in_two_moves(folder: Path, version: int) -> None:
    """As where a file system can't exchange two names."""
    exchange, replace_folder.exchange = replace_folder.exchange, lambda a, b: False
    try:
        save(folder, version)
    finally:
        replace_folder.exchange = exchange


def run(folder: Path, version: int) -> None:
    found = converted(version)
    told = Workdir.prepare(folder, found.plan, _RECIPES[version]).keep(found)
    assert not told, told


def ran(folder: Path) -> int:
    version = thesean.load(folder / "converted").report.seed
    if (folder / "recipe.yaml").exists():
        assert Recipe.from_yaml(folder / "recipe.yaml") == _RECIPES[version], "a recipe of another run"
    return version


def export(folder: Path, version: int) -> None:
    onnx_file(folder / "m.onnx", float(version))


def exported(folder: Path) -> int:
    import numpy as np

    outputs, _ = Session(folder / "m.onnx").run({"x": np.zeros((1, 1000), np.float32)})
    return int(outputs["y"][0, 0])


def write(folder: Path, version: int) -> None:
    write_text(folder / "plan.yaml", str(version) * 100_000)


def written(folder: Path) -> int:
    (found,) = set((folder / "plan.yaml").read_text())
    assert (folder / "plan.yaml").stat().st_size == 100_000
    return int(found)


VICTIMS = {
    "a save over a conversion": Victim(write=save, read=saved, names=frozenset({"saved"}), notes="saved"),
    "a save in two moves": Victim(write=save_in_two_moves, read=saved, names=frozenset({"saved"}), notes="saved"),
    "a run in its workdir": Victim(
        write=run, read=ran, names=frozenset({"converted", "plan.yaml", "recipe.yaml"}), notes="converted"
    ),
    "an export with weights beside": Victim(write=export, read=exported, names=frozenset({"m.onnx"})),
    "a file": Victim(write=write, read=written, names=frozenset({"plan.yaml"})),
}


def killed(victim: Victim, points: int, seed: int) -> Counts:
    """Verdicts by count."""
    counts = dict.fromkeys(VERDICTS, 0)
    chance = random.Random(seed)
    lasts = statistics.median(_once(victim, None)[1] for _ in range(3))
    for _ in range(points):
        counts[_once(victim, chance.uniform(0, 1.2 * lasts))[0]] += 1
    return counts


def _once(victim: Victim, after: float | None) -> tuple[str, float]:
    """The verdict of a kill after so many seconds, None for never; and how long the writing took."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        victim.write(folder, 0)
        if victim.notes:
            (folder / victim.notes / MINE).write_text("mine")
        start = time.monotonic()
        _write_in_a_fork(victim, folder, after)
        took = time.monotonic() - start
        return _verdict(victim, folder), took
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_in_a_fork(victim: Victim, folder: Path, after: float | None) -> None:
    child = os.fork()
    if child == 0:
        try:
            victim.write(folder, 1)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _verdict(victim: Victim, folder: Path) -> str:
    try:
        if victim.read(folder) not in (0, 1):
            return "wrong"
    except Exception:
        return "lost"
    try:
        victim.write(folder, 1)
        if victim.read(folder) != 1:
            return "wrong"
    except Exception:
        return "foreign"
    if victim.notes and (folder / victim.notes / MINE).read_text() != "mine":
        return "lost"
    left = {p.name for p in folder.iterdir() if not p.name.endswith(".weights")}
    return "right" if left == victim.names else "wrong"
