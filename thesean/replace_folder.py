"""A folder takes another's place in one step, whoever kills the process and whoever else writes there.

The new folder is made in a hidden one beside it, `.NAME.thesean-xxxxxxxx`, whose file `lock` is locked for as long as
its process lives. What a killed process leaves behind has no owner, and goes with the next replacement.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and leftovers stay
    fcntl = None  # type: ignore[assignment]

_LOCK, _MADE, _EARLIER = "lock", "made", "earlier"

_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2  # <fcntl.h>, <linux/fs.h> and macOS's <sys/stdio.h>
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` at the end; after an error all is as it was.

    A link is followed. Where the file system can't exchange two names, `folder` is moved away first: killed between
    the two moves, its content is where `standing` finds it. Raises OSError.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with _scratch(folder) as scratch:
        made = scratch / _MADE
        made.mkdir()  # not the scratch folder itself, which only its owner may read
        yield made
        _put(made, folder)
    _remove_leftovers(folder)


def standing(folder: Path) -> Path:
    """Where the content of `folder` is: there, but after a replacement that was killed between two moves."""
    if folder.exists():
        return folder
    real = folder.resolve()
    moved = [p for scratch in _scratches(real) for p in scratch.glob(f"{_EARLIER}*")]
    return max(moved, key=lambda p: (p.parent.stat().st_mtime, p.name), default=folder)


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


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, locked while the block runs and gone after it."""
    while True:
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.thesean-"))
        try:
            lock = os.open(scratch / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        if _locked(lock, scratch) is not False:
            break
        os.close(lock)
    try:
        yield scratch
    finally:
        os.close(lock)  # first, for Windows removes no open file
        _remove(scratch)


def _locked(lock: int, scratch: Path) -> bool | None:
    """Lock a scratch folder; False where another process owns or has removed it, None where nothing can be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), os.stat(scratch / _LOCK))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a network's file system without locks
        return None


def _scratches(folder: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.thesean-[a-z0-9_]{{8}}")
    try:
        return [p for p in folder.parent.iterdir() if pattern.fullmatch(p.name)]
    except OSError:
        return []


def _remove_leftovers(folder: Path) -> None:
    """Those of killed processes, unless they may hold what should stand in `folder`."""
    for scratch in _scratches(folder) if folder.exists() else ():
        try:
            lock = os.open(scratch / _LOCK, os.O_RDWR)
        except OSError:
            with suppress(OSError):
                scratch.rmdir()  # killed before it was locked, and empty; or another's, and not
            continue
        if _locked(lock, scratch):
            _remove(scratch)
        os.close(lock)


def _remove(scratch: Path) -> None:
    """The lock last: what a kill leaves of it is a leftover still. What can't be removed stays."""
    with suppress(OSError):
        for path in scratch.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
        (scratch / _LOCK).unlink()
        scratch.rmdir()
