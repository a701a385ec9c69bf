"""What everything that writes shares: a hidden folder beside the name that is written, and how a failure is told.

The folder is `.NAME.thesean-xxxxxxxx`; its file `lock` is locked for as long as its process lives. What a killed
process leaves behind has no owner, and goes with the next write of that name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from thesean.errors import TheseanError, WriteError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and leftovers stay
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"
_TURNS, _TURN = 2500, 0.002  # seconds that a process waits for another's moves, which take none
_LONGEST = 200  # bytes of a name; with what is put around it, a file system's 255 hold it

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = (errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP)


def named(path: Any, verb: str = "write", kind: type[TheseanError] = WriteError) -> Path:
    """`path`, as no more than a name. Raises an error of this kind for what can't be one."""
    if not isinstance(path, (str, os.PathLike)):
        raise kind(f"can't {verb} {path!r}: expected a path, found {type(path).__name__}.")
    try:
        if not os.fspath(path):
            raise kind(f"can't {verb} '': the name is empty. Name a file or a folder; the one we are in is '.'.")
        found = Path(path)
        encoded = os.fsencode(found)
    except (TypeError, ValueError) as error:  # bytes; letters that no file system takes
        raise kind(f"can't {verb} {path!r}: {error}. Choose another name.") from error
    if b"\0" in encoded:
        raise kind(f"can't {verb} {str(path)!r}: the name holds a NUL. Choose another name.")
    return found


def followed(path: Path) -> Path:
    """Where a link leads, be there something or not. Raises OSError for one that leads to itself."""
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


@contextmanager
def telling(path: Path, what: str = "") -> Iterator[None]:
    """OSError inside becomes WriteError, which names path, reason and next step. `what` stands before the path."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise refusal(path, error, what) from error


def refusal(path: Path, error: Exception, what: str = "") -> WriteError:
    code = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or error
    if code in _FULL:
        step = "Free some space, or choose another folder"
    elif code in _NAMES:
        step = "Choose another name"
    else:
        step = "Choose a writable folder"
    return WriteError(f"can't write {what}{path}: {reason}. {step}.")


@contextmanager
def scratch(target: Path, spared: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """A hidden folder beside `target`, locked while the block runs and gone after it, unless `spared` then. Raises
    OSError.
    """
    while True:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{_short(target.name)}.thesean-"))
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        except BaseException:
            with suppress(OSError):
                folder.rmdir()
            raise
        if _locked(lock, folder) is not False:
            break
        os.close(lock)
    try:
        yield folder
    finally:
        os.close(lock)  # first, for Windows removes no open file
        if not spared(folder):
            remove(folder)


def scratches(target: Path) -> list[Path]:
    """All of a name, of the living and of the killed."""
    return _matching(target.parent, re.escape(_short(target.name)))


def leftovers(target: Path) -> Iterator[Path]:
    """Those of killed processes, each locked while the caller looks at it."""
    return _unowned(scratches(target))


def clear(folder: Path) -> None:
    """Remove what killed processes left of files in `folder`, whatever their names."""
    for left in _unowned(_matching(folder, ".+")):
        with suppress(OSError):
            if not any(p.is_dir() for p in left.iterdir()):  # else of a folder's replacement, which knows what to do
                remove(left)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process after the other inside, of those that say so of the same folder; but none waits for ever."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        yield
        return
    try:
        for _ in range(_TURNS):
            if _flocked(handle) is not False:
                break
            time.sleep(_TURN)
        yield
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """A scratch folder, the lock last: what a kill leaves of it is a leftover still. What can't be removed stays."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name == _LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        (folder / _LOCK).unlink()
        folder.rmdir()


def sync(path: Path) -> None:
    """Onto the disk, be it a file or a folder, as far as the system has a word for that. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    except PermissionError:  # Windows opens no folder; and what may not be read was written by us all the same
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(name: str) -> str:
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST:
        return name
    return f"{encoded[: _LONGEST - 20].decode(errors='ignore')}.{hashlib.sha256(encoded).hexdigest()[:16]}"


def _matching(parent: Path, name: str) -> list[Path]:
    pattern = re.compile(rf"\.{name}\.thesean-[a-z0-9_]{{8}}", re.DOTALL)
    try:
        return [p for p in parent.iterdir() if pattern.fullmatch(p.name)]
    except OSError:
        return []


def _unowned(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            with suppress(OSError):
                folder.rmdir()  # killed before it was locked, and empty; or another's, and not
            continue
        try:
            if _locked(lock, folder):
                yield folder
        finally:
            os.close(lock)


def _locked(lock: int, folder: Path) -> bool | None:
    """Lock a scratch folder; False where another process owns or has removed it, None where nothing can be locked."""
    got = _flocked(lock)
    if not got:
        return got
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK))
    except FileNotFoundError:
        return False


def _flocked(handle: int) -> bool | None:
    """Lock what is open; False where another process has, None where nothing can be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a network's file system without locks
        return None
