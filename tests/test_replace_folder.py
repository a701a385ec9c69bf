"""A folder is replaced in one step, whoever is killed and whoever else writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thesean import replace_folder
from thesean.replace_folder import exchange, replacing, standing

# Runs without the package, which would import torch. A process is forked for each line of the file; it stops there.
STOPPED = """
import importlib.util, os, signal, sys
from pathlib import Path
place, root, mode, exchanges = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
spec = importlib.util.spec_from_file_location("replace_folder", place)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if not exchanges:
    module.exchange = lambda a, b: False

def write(folder, text):
    with module.replacing(folder) as made:
        for name in ("first", "second"):
            (made / name).write_text(text)

def read(folder):
    texts = {(module.standing(folder) / name).read_text() for name in ("first", "second")}
    assert len(texts) == 1, texts
    return texts.pop()

def stop_at(line):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != place:
            return None
        if event == "line":
            count += 1
            if count == line:
                if mode == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
        return trace
    return trace

line, found, leftovers = 0, set(), 0
while True:
    line += 1
    folder = root / str(line) / "saved"
    write(folder, "old")
    child = os.fork()
    if child == 0:
        sys.settrace(stop_at(line))
        try:
            write(folder, "new")
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.add(read(folder))
    leftovers += len(list(folder.parent.iterdir())) > 1
    write(folder, "newer")
    assert read(folder) == "newer"
    assert [p.name for p in folder.parent.iterdir()] == ["saved"], (line, list(folder.parent.rglob("*")))
    if status == 0:
        break
assert found == {"old", "new"}, found
print(line, leftovers)
"""


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("mode", ["kill", "interrupt"])
def test_stopped_at_any_line_the_old_folder_or_the_new_one_stands_and_the_next_one_cleans_up(mode, exchanges, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", STOPPED, replace_folder.__file__, str(tmp_path), mode, str(exchanges)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines, leftovers = map(int, run.stdout.split())
    assert lines > 40
    assert leftovers > 5 or mode == "interrupt"


# Each of the processes replaces the folder again and again; the first one watches that something always stands there.
TOGETHER = """
import importlib.util, os, sys
from pathlib import Path
place, folder, exchanges = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True"
spec = importlib.util.spec_from_file_location("replace_folder", place)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if not exchanges:
    module.exchange = lambda a, b: False
children = []
for number in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        for turn in range(100):
            with module.replacing(folder) as made:
                for name in ("first", "second"):
                    (made / name).write_text(f"{number} {turn}")
        os._exit(0)
running, missing, seen = set(children), 0, False
while running:
    there = folder.exists()
    missing += seen and not there
    seen = seen or there
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        assert status == 0
        running.remove(pid)
assert not (exchanges and missing), missing
assert (folder / "first").read_text() == (folder / "second").read_text()
assert (folder / "first").read_text().endswith(" 99")
assert [p.name for p in folder.parent.iterdir()] == [folder.name], list(folder.parent.iterdir())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("exchanges", [True, False])
def test_processes_that_write_at_once_all_succeed_and_leave_one_whole_folder(exchanges, tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-c", TOGETHER, replace_folder.__file__, str(tmp_path / "all" / "saved"), str(exchanges)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def write(folder: Path, text: str) -> None:
    with replacing(folder) as made:
        (made / "text").write_text(text)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no system call that exchanges names")
def test_two_names_are_exchanged_in_one_step(tmp_path: Path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "mark").write_text("")
    if not exchange(a, b):
        pytest.skip("this file system can't")
    assert (b / "mark").exists()
    assert not (a / "mark").exists()
    with pytest.raises(FileNotFoundError):
        exchange(a, tmp_path / "c")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_names_cannot_be_exchanged_two_moves_do_it(code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Libc:
        @staticmethod
        def renameat2(*arguments: object) -> int:
            replace_folder.ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(replace_folder.ctypes, "CDLL", lambda *_, **__: Libc)
    for text in ("old", "new"):
        write(tmp_path / "saved", text)
    assert (tmp_path / "saved" / "text").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_system_without_the_call_exchanges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replace_folder.ctypes, "CDLL", lambda *_, **__: object())
    assert not exchange(tmp_path / "a", tmp_path / "b")


def test_without_locks_folders_are_replaced_and_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = tmp_path / ".saved.thesean-abcdefgh"
    (left / "made").mkdir(parents=True)
    (left / "lock").touch()
    monkeypatch.setattr(replace_folder, "fcntl", None)
    for text in ("old", "new"):
        write(tmp_path / "saved", text)
    assert (tmp_path / "saved" / "text").read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"saved", left.name}
    monkeypatch.undo()
    write(tmp_path / "saved", "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.skipif(replace_folder.fcntl is None, reason="no locks")
def test_what_a_living_process_writes_and_what_is_not_ours_is_left_alone(tmp_path: Path):
    mine = [tmp_path / name for name in (".saved.thesean-mine", ".saved-abcdefgh", ".saved2.thesean-abcdefgh")]
    for folder in mine:
        folder.mkdir()
        (folder / "lock").touch()
    unlocked = tmp_path / ".saved.thesean-abcdefgh"
    unlocked.mkdir()
    (unlocked / "thesis.tex").write_text("years of work")
    with replacing(tmp_path / "saved") as made:
        (made / "text").write_text("first")
        write(tmp_path / "saved", "second")  # would take `made` for a leftover
        assert (made / "text").read_text() == "first"
    assert (tmp_path / "saved" / "text").read_text() == "first"
    assert all(folder.exists() for folder in mine)
    assert (unlocked / "thesis.tex").exists()


def test_after_an_error_all_is_as_it_was(tmp_path: Path):
    write(tmp_path / "saved", "old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "saved") as made:
        (made / "folder that is not there" / "text").write_text("new")
    assert (tmp_path / "saved" / "text").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "saved")
    for text in ("old", "new"):
        write(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "saved" / "text").read_text() == "new"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["saved"]


def test_a_folder_that_was_never_there_stands_nowhere_else(tmp_path: Path):
    assert standing(tmp_path / "saved") == tmp_path / "saved"
    assert standing(tmp_path / "none" / "saved") == tmp_path / "none" / "saved"
