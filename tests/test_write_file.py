"""A file keeps its content until the new one is whole; a failure names path and reason and leaves nothing behind.

Every public writer goes through the same one: the table at the end holds them all to it.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import captured
from thesean import Plan, Recipe, scratch
from thesean.errors import ArtifactError, TheseanError, WriteError
from thesean.passes.graph.dump import dumping
from thesean.passes.plan.make_plan import make_plan
from thesean.report.report_json import write_report
from thesean.write_file import new_file, write_text

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and links of files")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_written_and_replaced(tmp_path: Path):
    for text in ("old", "größer"):
        assert write_text(str(tmp_path / "a.txt"), text) == tmp_path / "a.txt"
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("at", ["write_text", "fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(at, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patched:
        patched.setattr(scratch.os if at == "fsync" else Path, at, full)
        with pytest.raises(WriteError, match=r"can't write .*a\.txt: No space left on device\. Free some space"):
            write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_of_whoever_writes_leaves_the_earlier_file(tmp_path: Path):
    write_text(tmp_path / "a.txt", "old")

    def interrupted(made: Path) -> None:
        made.write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a.txt") as made:
        interrupted(made)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@POSIX
def test_a_link_is_followed_even_to_what_is_not_there_yet(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(Path("disk") / "a.txt")
    for text in ("old", "new"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "disk" / "a.txt").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["a.txt"]


@POSIX
def test_modes_are_those_of_the_earlier_file_or_what_the_umask_asks_for(tmp_path: Path):
    write_text(tmp_path / "a.txt", "old")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask
    (tmp_path / "a.txt").chmod(0o600)
    write_text(tmp_path / "a.txt", "new")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o600


@POSIX
def test_a_pipe_is_written_into(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join(10)
    assert read == ["text"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(WriteError, match="it is no file"), new_file(tmp_path / "pipe"):
        pytest.fail("reached")


@POSIX
def test_what_killed_processes_left_goes_with_the_next_write(tmp_path: Path):
    left = tmp_path / ".a.txt.thesean-abcdefgh"
    other = tmp_path / ".b.txt.thesean-abcdefgh"
    for folder in (left, other):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "made.txt").write_text("half of")
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == [other.name, "a.txt"]
    with dumping(tmp_path):  # its files have a new name each time
        assert names(tmp_path) == ["a.txt"]


@POSIX
def test_what_is_being_written_by_another_is_left_alone(tmp_path: Path):
    with new_file(tmp_path / "a.txt") as made:
        made.write_text("first")
        write_text(tmp_path / "a.txt", "second")
        assert made.read_text() == "first"
    assert (tmp_path / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(captured.mlp(), "mlp").plan


@pytest.fixture(scope="module")
def comparison() -> thesean.Comparison:
    return thesean.Comparison(
        measure="cka", estimator="all", name_a="a", name_b="b", layers_a=("x",), layers_b=("y",),
        matrix=torch.ones(1, 1), examples=4,
    )  # fmt: skip


def dumped(path: Any) -> None:
    with dumping(path):
        pytest.fail("reached")


Writer = Callable[[Any], Any]
WRITERS = ("plan", "recipe", "drawing", "report", "comparison", "heatmap", "graphs")


@pytest.fixture
def writer(request: pytest.FixtureRequest, plan: Plan, comparison: thesean.Comparison) -> Writer:
    writers: dict[str, Writer] = {
        "plan": plan.to_yaml,
        "recipe": Recipe.named("fast").to_yaml,
        "drawing": plan.draw,
        "report": lambda path: write_report(path, []),
        "comparison": comparison.to_json,
        "heatmap": comparison.plot,
        "graphs": dumped,
    }
    if request.param == "heatmap":
        pytest.importorskip("matplotlib")
    return writers[request.param]


@pytest.mark.parametrize("writer", WRITERS, indirect=True)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 300 + ".svg", "File name too long"),
        ("a\0b.svg", "holds a NUL"),
        ("\ud800.svg", "surrogates not allowed"),
        (b"a.svg", "expected a path, found bytes"),
        (5, "expected a path, found int"),
        ("file/below.svg", "(Not a directory|File exists)"),
        ("loop/below.svg", "symbolic links"),
    ],
    ids=["long", "NUL", "surrogate", "bytes", "number", "below a file", "loop"],
)
def test_each_writer_names_path_and_reason(writer: Writer, path: Any, reason: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(WriteError, match=rf"(?s)can't write .*{reason}"):
        writer(str(tmp_path / path) if isinstance(path, str) else path)
    assert names(tmp_path) == ["file", "loop"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("writer", [w for w in WRITERS if w != "graphs"], indirect=True)
def test_each_writer_leaves_the_earlier_file_on_a_full_disk(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.svg"
    path.write_text("earlier")
    monkeypatch.setattr(scratch.os, "fsync", full)
    with pytest.raises(WriteError, match=r"can't write .*a\.svg: No space left on device"):
        writer(path)
    assert names(tmp_path) == ["a.svg"]
    assert path.read_text() == "earlier"


def test_the_error_is_one_of_ours_and_the_systems_too():
    assert issubclass(WriteError, TheseanError)
    assert issubclass(WriteError, ArtifactError)
    assert issubclass(WriteError, OSError)


def test_a_format_that_no_one_writes_is_told(comparison: thesean.Comparison, tmp_path: Path):
    pytest.importorskip("matplotlib")
    for name in ("a", "a.xyz"):
        with pytest.raises(TheseanError, match=r"plot .*: expected a name that ends in one of .*png"):
            comparison.plot(tmp_path / name)
    assert names(tmp_path) == []
