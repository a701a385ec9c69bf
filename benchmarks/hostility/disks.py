"""Disks that are full, folders that may not be written, and many who write at once: the earlier file stays, whole.

A disk is full by a limit on the size of files and, where one may be mounted, as a small file system in memory.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

import thesean
from benchmarks.hostility.guides import compiled, vectors
from benchmarks.hostility.paths import FILES, FOLDERS, Writer, dumped, onnx_file
from benchmarks.hostility.saved import converted
from benchmarks.hostility.trial import MINE, Call, Inputs, Lost, check, only_typed
from thesean.errors import TheseanError

_NEW_MOUNTS, _PRIVATE, _RECURSIVE = 0x20000, 1 << 18, 1 << 14  # <sched.h>, <sys/mount.h>
_NOBODY = 65534

WRITERS: dict[str, tuple[str, Writer]] = {**FILES, "a conversion": ("", FOLDERS["a conversion"])}


def content(place: Path) -> dict[str, bytes | None]:
    """All that stands there by its path, hidden things too."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def keeps(place: Path, write: Callable[[], object]) -> None:
    """What fails leaves all as it was."""
    before = content(place)
    try:
        write()
    except TheseanError:
        after = content(place)
        for name, value in before.items():
            if after.get(name, b"") != value:
                raise Lost(f"{name} is not what it was") from None
        check(after.keys() == before.keys(), f"left behind: {sorted(after.keys() - before.keys())}")
        raise


def size_of(place: Path) -> int:
    return max(p.stat().st_size for p in (place, *place.rglob("*")) if p.is_file())


def limited(writer: Writer, ending: str, share: float) -> Call:
    """No file may be larger than a share of the largest that it writes."""

    def calling(folder: Path) -> None:
        place = folder / f"x{ending}"
        writer(place)
        limit = int(share * size_of(place))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        keeps(folder, lambda: writer(place))

    return calling


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system in memory, which goes with this process. Raises OSError where none may be mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    disk = folder / "disk"
    disk.mkdir()

    def called(found: int) -> None:
        if found:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    called(libc.unshare(_NEW_MOUNTS))
    called(libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None))
    called(libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, f"size={kilobytes}k".encode()))
    yield disk


@cache
def mounts() -> bool:
    """Whether a small disk can be had here."""
    if sys.platform != "linux":
        return False
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                with small_disk(Path(folder), 64):
                    os._exit(0)
            except BaseException:
                os._exit(1)
        return os.waitpid(child, 0)[1] == 0


def filled(disk: Path, left: int) -> None:
    """But for so many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "film.mkv").write_bytes(bytes(max(0, free - left)))


def on_a_small_disk(writer: Writer, ending: str, left: int) -> Call:
    def calling(folder: Path) -> None:
        with small_disk(folder, 512) as disk:
            place = disk / f"x{ending}"
            writer(place)
            (disk / MINE).write_text("mine")
            filled(disk, left)
            keeps(disk, lambda: writer(place))

    return calling


def trained_on_a_small_disk(folder: Path) -> None:
    """What was trained is returned, and kept elsewhere."""
    with small_disk(folder, 512) as disk:
        work = disk / "work"
        compiled(workdir=work, recipe="fast")
        before = content(work)

        def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            filled(disk, 0)  # while it trains
            return output.square().mean()

        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = compiled(workdir=work, loss=loss)
        check(content(work) == before, "the earlier run is not what it was")
        words = [str(w.message) for w in told if "not saved" in str(w.message)]
        check(words, "nothing was said")
        place = words[0].partition("thesean.load('")[2].partition("')")[0]
        x_BTD = vectors(1)[0]
        check(torch.equal(thesean.load(place)(x_BTD), found(x_BTD)), "what was kept is something else")


def started_under_a_limit(folder: Path) -> None:
    """On the size of files: found before a step is taken."""
    (folder / "work").mkdir()
    calls: list[int] = []

    def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output.square().mean()

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        keeps(folder / "work", lambda: compiled(workdir=folder / "work", loss=loss))
    finally:
        check(not calls, "it trained first")


def started_on_a_full_disk(folder: Path) -> None:
    """Found before a step is taken."""
    with small_disk(folder, 64) as disk:
        (disk / "work").mkdir()
        filled(disk, 4096)
        calls: list[int] = []

        def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return output.square().mean()

        try:
            keeps(disk, lambda: compiled(workdir=disk / "work", loss=loss))
        finally:
            check(not calls, "it trained first")


def graphs_on_a_small_disk(folder: Path) -> None:
    """A dump that ends costs no conversion."""
    with small_disk(folder, 64) as disk:
        dumped(disk / "graphs")
        filled(disk, 12_000)
        compiled(dump_graphs=disk / "graphs")
        check(all(p.read_bytes().endswith(b"\n") for p in (disk / "graphs").iterdir()), "half a graph")


def as_nobody(folder: Path) -> None:
    """Whom the modes of files hold; an administrator they don't."""
    folder.chmod(0o755)
    for name in ("home", "tmp"):
        (folder / name).chmod(0o777)
    if os.geteuid() == 0:
        os.setegid(_NOBODY)
        os.seteuid(_NOBODY)


def in_a_read_only_folder(writer: Writer, ending: str) -> Call:
    def calling(folder: Path) -> None:
        place = folder / "shut" / f"x{ending}"
        place.parent.mkdir()
        writer(place)
        place.parent.chmod(0o555)
        as_nobody(folder)
        keeps(place.parent, lambda: writer(place))

    return calling


def over_a_read_only_file(writer: Writer, ending: str) -> Call:
    def calling(folder: Path) -> None:
        place = folder / "open" / f"x{ending}"
        place.parent.mkdir()
        writer(place)
        place.chmod(0o444)
        place.parent.chmod(0o777)
        as_nobody(folder)
        keeps(place.parent, lambda: writer(place))

    return calling


def trained_in_a_read_only_folder(folder: Path) -> None:
    (folder / "shut").mkdir()
    (folder / "shut").chmod(0o555)
    as_nobody(folder)
    keeps(folder / "shut", lambda: compiled(workdir=folder / "shut" / "work"))


def at_once(write: Callable[[int], object], read: Callable[[], object], writers: int = 4, turns: int = 12) -> int:
    """So many processes that write, and a reader beside them. Returns how often it read."""
    children = []
    for number in range(writers):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for turn in range(turns):
                    write(1 + number * turns + turn)
                os._exit(0)
            except BaseException:
                os._exit(1)
    reads = 0
    left = set(children)
    while left:
        read()
        reads += 1
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            check(status == 0, "a writer failed")
            left.discard(pid)
    return reads


def saved_at_once(folder: Path) -> None:
    place = converted().save(folder / "saved")
    (place / MINE).write_text("mine")

    def read() -> None:
        thesean.load(place)
        check((place / MINE).read_text() == "mine", "the user's file was gone")

    check(at_once(lambda seed: converted(seed).save(place), read) > 2, "hardly anything was read")
    check({p.name for p in folder.iterdir()} == {"saved", MINE, "home", "tmp"}, "something was left behind")


def exported_at_once(folder: Path) -> None:
    from thesean.deploy.onnx_file import weights_of

    (folder / "onnx").mkdir()
    place = folder / "onnx" / "m.onnx"
    onnx_file(place)
    at_once(lambda seed: onnx_file(place, float(seed)), lambda: None)
    check(weights_of(place) is not None, "the model has lost its weights")
    onnx_file(place, 0.0)
    check(len(list(place.parent.iterdir())) == 2, "something was left behind")


def planned_at_once(folder: Path) -> None:
    place = folder / "plans" / "plan.yaml"
    place.parent.mkdir()
    converted().plan.to_yaml(place)
    at_once(lambda seed: converted().plan.to_yaml(place), lambda: thesean.Plan.from_yaml(place))
    check([p.name for p in place.parent.iterdir()] == ["plan.yaml"], "something was left behind")


def _inputs() -> dict[str, Call]:
    found: dict[str, Call] = {}
    for what, (ending, writer) in WRITERS.items():
        for share in (0.0, 0.5, 0.99):
            found[f"{what} where no file may pass {share:.0%} of its size"] = limited(writer, ending, share)
        if mounts():
            for left in (0, 8192):
                found[f"{what} onto a disk with {left:,} bytes left"] = on_a_small_disk(writer, ending, left)
        found[f"{what} into a read-only folder"] = in_a_read_only_folder(writer, ending)
        if ending:
            found[f"{what} over a read-only file"] = over_a_read_only_file(writer, ending)
    if mounts():
        found["a disk that fills while it trains"] = trained_on_a_small_disk
        found["a disk that is full from the start"] = started_on_a_full_disk
        found["a disk that fills while graphs are dumped"] = graphs_on_a_small_disk
    found["a workdir where no file may pass 1 kB"] = only_typed(started_under_a_limit)
    found["a workdir in a read-only folder"] = trained_in_a_read_only_folder
    found["four processes that save, and one that loads"] = saved_at_once
    found["four processes that export"] = exported_at_once
    found["four processes that write a plan, and one that reads"] = planned_at_once
    return found


INPUTS: Inputs = _inputs()
