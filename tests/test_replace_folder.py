"""A folder is replaced in one step, whoever is killed and whoever else writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thesean import replace_folder, scratch
from thesean.replace_folder import exchange, reading, replacing, standing

# Runs without the package's __init__, which would import torch.
ALONE = """
import os, signal, sys, types
from pathlib import Path
package = types.ModuleType("thesean")
package.__path__ = [sys.argv[1]]
sys.modules["thesean"] = package
from thesean import replace_folder, scratch, write_file
from thesean.replace_folder import reading, replacing, standing
os.fsync = lambda handle: None  # it takes its time, and a process that is killed takes no power with it
if sys.argv[3] != "True":
    replace_folder.exchange = lambda a, b: False
NAMES = ("first", "second")
def write(folder, text):
    with replacing(folder, NAMES) as made:
        for name in NAMES:
            (made / name).write_text(text)
def read(folder):
    texts = {(standing(folder) / name).read_text() for name in NAMES}
    assert len(texts) == 1, texts
    return texts.pop()
"""

# What a process is traced by that stops at the n-th line of the files in PLACES.
STOP_AT = """
def stop_at(line, mode="kill"):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in PLACES:
            return None
        if event == "line":
            count += 1
            if count == line:
                if mode == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
        return trace
    return trace
"""

# A process is forked for each line of the files; it stops there.
STOPPED = (
    ALONE
    + STOP_AT
    + """
root, mode, what = Path(sys.argv[2]), sys.argv[4], sys.argv[5]
PLACES = {m.__file__ for m in (replace_folder, scratch, write_file)}
if what == "file":
    write, read = write_file.write_text, lambda path: path.read_text()

line, found, leftovers = 0, set(), 0
while True:
    line += 1
    place = root / str(line) / "saved"
    place.parent.mkdir()
    write(place, "old")
    if what == "folder":
        (place / "notes.txt").write_text("mine")
        (place / "thesis").mkdir()
        (place / "thesis" / "chapter.tex").write_text("mine")
    child = os.fork()
    if child == 0:
        sys.settrace(stop_at(line, mode))
        try:
            write(place, "new")
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.add(read(place))
    assert what == "file" or (standing(place) / "notes.txt").read_text() == "mine"
    leftovers += len(list(place.parent.iterdir())) > 1
    write(place, "newer")
    assert read(place) == "newer"
    if what == "folder":
        assert {p.name for p in place.iterdir()} == {*NAMES, "notes.txt", "thesis"}, line
        assert (place / "notes.txt").read_text() == (place / "thesis" / "chapter.tex").read_text() == "mine"
    assert [p.name for p in place.parent.iterdir()] == ["saved"], (line, list(place.parent.rglob("*")))
    if status == 0:
        break
assert found == {"old", "new"}, found
print(line, leftovers)
"""
)


def run(script: str, *arguments: object) -> str:
    package = str(Path(replace_folder.__file__).parent)
    found = subprocess.run(
        [sys.executable, "-c", script, package, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("what", "exchanges"), [("folder", True), ("folder", False), ("file", True)])
@pytest.mark.parametrize("mode", ["kill", "interrupt"])
def test_stopped_at_any_line_the_old_one_or_the_new_one_stands_and_the_next_one_cleans_up(
    mode, what, exchanges, tmp_path
):
    lines, leftovers = map(int, run(STOPPED, tmp_path, exchanges, mode, what).split())
    assert lines > 40
    assert leftovers > 5 or mode == "interrupt"


# Each of the processes replaces the folder again and again; the first one reads, and always finds one that is whole.
TOGETHER = (
    ALONE
    + """
folder = Path(sys.argv[2])
enough = folder.parent.parent / "enough"  # was read: a busy machine may give the reader little time
write(folder, "first")
(folder / "notes.txt").write_text("mine")
children = []
for number in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        turn = 0
        while turn < 60 or not enough.exists():
            write(folder, f"{number} {turn}")
            turn += 1
        write(folder, f"{number} last")
        os._exit(0)
running, reads, seen = set(children), 0, set()
while running:
    seen.add(reading(folder, read))
    reads += 1
    if len(seen) > 20:
        enough.touch()
    assert reading(folder, lambda found: (standing(found) / "notes.txt").read_text()) == "mine"
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        assert status == 0
        running.remove(pid)
assert read(folder).endswith(" last")
assert [p.name for p in folder.parent.iterdir()] == [folder.name], list(folder.parent.iterdir())
assert {p.name for p in folder.iterdir()} == {*NAMES, "notes.txt"}
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("exchanges", [True, False])
def test_processes_that_write_at_once_all_succeed_and_a_reader_sees_whole_folders(exchanges, tmp_path: Path):
    run(TOGETHER, tmp_path / "all" / "saved", exchanges)


def write(folder: Path, text: str) -> None:
    with replacing(folder) as made:
        (made / "text").write_text(text)


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks")
def test_no_one_waits_for_ever_for_another_program_that_has_locked_the_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scratch, "_TURNS", 3)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        scratch.fcntl.flock(handle, scratch.fcntl.LOCK_EX)
        write(tmp_path / "saved", "text")
    finally:
        os.close(handle)
    assert (tmp_path / "saved" / "text").read_text() == "text"


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
    monkeypatch.setattr(scratch, "fcntl", None)
    for text in ("old", "new"):
        write(tmp_path / "saved", text)
    assert (tmp_path / "saved" / "text").read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"saved", left.name}
    monkeypatch.undo()
    write(tmp_path / "saved", "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks")
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


OURS = ("text",)


def rewrite(folder: Path, text: str) -> None:
    with replacing(folder, OURS) as made:
        (made / "text").write_text(text)


def test_what_is_not_ours_stays_in_the_folder(tmp_path: Path):
    folder = tmp_path / "saved"
    rewrite(folder, "old")
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.txt").write_text("mine too")
    (folder / "link").symlink_to("nowhere")
    before = (folder / "notes.txt").stat().st_ino
    rewrite(folder, "new")
    assert (folder / "text").read_text() == "new"
    assert (folder / "notes.txt").stat().st_ino == before
    assert (folder / "sub" / "deep.txt").read_text() == "mine too"
    assert (folder / "link").is_symlink()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_what_somebody_changes_while_a_folder_is_made_is_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "saved"
    rewrite(folder, "old")
    (folder / "notes.txt").write_text("before")
    put = replace_folder._put

    def meanwhile(made: Path, place: Path) -> None:
        (tmp_path / "edited").write_text("after")
        (tmp_path / "edited").replace(folder / "notes.txt")  # as editors do
        (folder / "more.txt").write_text("more")
        put(made, place)

    monkeypatch.setattr(replace_folder, "_put", meanwhile)
    rewrite(folder, "new")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        "text": "new", "notes.txt": "after", "more.txt": "more"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_what_can_not_move_back_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "saved"
    rewrite(folder, "old")
    (folder / "sub").mkdir()

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        rewrite(folder, "new")
    (left,) = tmp_path.glob(".saved.thesean-*/made/sub")
    assert left.is_dir()
    rewrite(folder, "newer")
    assert (folder / "sub").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_name_that_fills_what_a_file_system_takes_is_taken(tmp_path: Path):
    folder = tmp_path / ("x" * 255)
    for text in ("old", "new"):
        write(folder, text)
    assert (folder / "text").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_link_to_itself_is_refused(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "loop", "text")
    assert (tmp_path / "loop").is_symlink()


def test_a_reader_starts_anew_when_the_folder_was_replaced_meanwhile(tmp_path: Path):
    folder = tmp_path / "saved"
    write(folder, "0")
    seen: list[str] = []

    def read(place: Path) -> str:
        found = (place / "text").read_text()
        if len(seen) < 3:
            seen.append(found)
            write(folder, str(len(seen)))
            if len(seen) == 2:
                raise ValueError("torn")
        return found

    assert reading(folder, read) == "3"
    assert seen == ["0", "1", "2"]


def test_a_readers_own_error_is_raised_at_once(tmp_path: Path):
    calls = []

    def broken(folder: Path) -> None:
        calls.append(folder)
        raise ValueError("broken")

    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="broken"):
            reading(place, broken)
    assert calls == [tmp_path, tmp_path / "none"]


def test_a_folder_that_was_never_there_stands_nowhere_else(tmp_path: Path):
    assert standing(tmp_path / "saved") == tmp_path / "saved"
    assert standing(tmp_path / "none" / "saved") == tmp_path / "none" / "saved"
