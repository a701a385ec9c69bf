"""A folder takes another's place in one step, whoever kills the process and whoever else reads or writes there."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from thesean.scratch import alone, followed, leftovers, remove, scratch, scratches, sync

T = TypeVar("T")

_MADE, _EARLIER = "made", "earlier"

_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2  # <fcntl.h>, <linux/fs.h> and macOS's <sys/stdio.h>
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)

_TURNS = 1000  # of a reader, each beaten by a writer; more is no accident
_ABSENT = 50  # times that a reader finds nothing, and something that is being written


@contextmanager
def replacing(
    folder: Path, ours: Collection[str] | None = None, during: AbstractContextManager[None] | None = None
) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` at the end; after an error all is as it was.

    ours: the names in it that are replaced; what else the earlier folder holds moves to the new one. None: all are.
    during: entered once the new folder is whole, right before the step, and left right after it.
    A link is followed. Where the file system can't exchange two names, `folder` is moved away first: killed between
    the two moves, its content is where `standing` finds it, and takes its name again with the next replacement.
    Raises OSError.
    """
    folder = followed(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _restore(folder)
    _remove_leftovers(folder, ours)
    with scratch(folder, lambda room: _holds_others(room, ours)) as room:
        made = room / _MADE
        made.mkdir()  # not the scratch folder itself, which only its owner may read
        yield made
        for path in made.rglob("*"):
            sync(path)
        sync(made)
        with alone(folder.parent):
            _link_others(folder, made, ours)
            try:
                with during or nullcontext():
                    _put(made, folder)
            except BaseException:
                _give_back(room, folder, ours)
                raise
            _give_back(room, folder, ours, newest=True)
        sync(folder.parent)
    _remove_leftovers(folder, ours)


def standing(folder: Path) -> Path:
    """Where the content of `folder` is: there, but after a replacement that was killed between two moves."""
    if folder.exists():
        return folder
    real = Path(os.path.realpath(folder))
    moved = [p for room in scratches(real) for p in room.glob(f"{_EARLIER}*")]
    return max(moved, key=lambda p: (p.parent.stat().st_mtime, p.name), default=folder)


def reading(folder: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a folder that others may replace meanwhile: of one version, again until it is."""
    absent = 0
    for _ in range(_TURNS):
        with _held(folder) as before:
            try:
                found = read(folder)
            except Exception:
                if before == _identity(folder):
                    absent += before is None
                    # between two moves it isn't there, and may not be there again by now
                    if before is not None or absent > _ABSENT or not scratches(folder):
                        raise
                    time.sleep(0.001)
                continue
            if before == _identity(folder):
                return found
    return read(folder)


@contextmanager
def _held(folder: Path) -> Iterator[tuple[int, int] | None]:
    """Its identity; while the block runs, no other folder gets the same."""
    handle = None
    with suppress(OSError, ValueError, AttributeError):  # Windows opens no folder
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _identity(folder) if handle is None else _of(os.fstat(handle))
    finally:
        if handle is not None:
            os.close(handle)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        return _of(folder.stat())
    except (OSError, ValueError):
        return None


def _of(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _put(made: Path, folder: Path) -> None:
    """`made` becomes `folder`; what stood there is left beside it, in the scratch folder."""
    for move in itertools.count():
        earlier = made.with_name(f"{_EARLIER}{move}")
        try:
            with suppress(FileNotFoundError):  # nothing stands there
                if exchange(made, folder):
                    return
                folder.rename(earlier)
            made.rename(folder)
            return
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _TAKEN:  # somebody else was faster
                continue
            if earlier.exists() and not folder.exists():
                earlier.rename(folder)
            raise


def exchange(a: Path, b: Path) -> bool:
    """Each of two names becomes the other's, in one step. False where system or file system can't."""
    libc: Any = None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(first, second, _SWAP)
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _link_others(folder: Path, made: Path, ours: Collection[str] | None) -> None:
    """Files of `folder` that are not ours stand in `made` too, so that they are there at every moment. What can't be
    linked, folders among it, moves after the exchange.
    """
    for path in _others(folder, ours):
        with suppress(OSError, NotImplementedError):
            os.link(path, made / path.name, follow_symlinks=False)


def _give_back(room: Path, folder: Path, ours: Collection[str] | None, newest: bool = False) -> None:
    """What is not ours in an earlier folder moves to the one that stands. `newest`: it is the one of two of a name that
    somebody changed last, while `folder` was made.
    """
    if ours is None or not folder.is_dir():
        return
    for old in _entries(room):
        for path in _others(old, ours):
            there = folder / path.name
            with suppress(OSError):
                if os.path.lexists(there) and os.path.samestat(path.lstat(), there.lstat()):
                    path.unlink()
                elif newest or not os.path.lexists(there):
                    path.replace(there)


def _holds_others(room: Path, ours: Collection[str] | None) -> bool:
    """Whether something is left that nobody else may have."""
    return any(_others(old, ours) for old in _entries(room))


def _others(folder: Path, ours: Collection[str] | None) -> list[Path]:
    return [] if ours is None else [p for p in _entries(folder) if p.name not in ours]


def _entries(folder: Path) -> list[Path]:
    """What is in it; nothing where it is no folder, or gone by now."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _restore(folder: Path) -> None:
    """What a kill between two moves took from its name gets it back."""
    for room in leftovers(folder) if not folder.exists() else ():
        for earlier in sorted(room.glob(f"{_EARLIER}*"), reverse=True):
            with suppress(OSError):  # somebody else was faster
                if not folder.exists():
                    earlier.rename(folder)


def _remove_leftovers(folder: Path, ours: Collection[str] | None) -> None:
    """Those of killed processes, unless they may hold what should stand in `folder`, or what nobody else has."""
    for room in leftovers(folder) if folder.exists() else ():
        _give_back(room, folder, ours)
        if not _holds_others(room, ours):
            remove(room)
