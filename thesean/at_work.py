"""One process at a time is at work in a folder: a second one would write over what the first one keeps.

The lock goes with its process, however that ends, and is not handed on to processes that it forks: the workers of a
DataLoader outlive a kill by some seconds, in which the same command has to go on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from thesean.errors import ResumeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"

_ours: set[Path] = set()  # which a record lock doesn't keep from this process itself


def occupy(folder: Path) -> Callable[[], None]:
    """Until what is returned is called, `occupy` raises ResumeError for this folder, here and in other processes. Where
    files can't be locked nothing is. Raises OSError.
    """
    path = folder.resolve() / LOCK
    if path in _ours:
        raise ResumeError(_busy(folder, "this process"))
    handle = _opened(path, folder)
    _ours.add(path)

    def leave() -> None:
        if path in _ours:
            _ours.remove(path)
            os.close(handle)

    return leave


def _opened(path: Path, folder: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(handle):
                who = os.read(handle, 200).decode(errors="replace")
                raise ResumeError(_busy(folder, f"process {who}" if who else "another process"))
            if os.path.samestat(os.fstat(handle), path.stat()):
                with suppress(OSError):  # a full disk keeps nobody from working
                    os.truncate(handle, 0)
                    os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except FileNotFoundError:  # who had it took it away
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _locked(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a network's file system without locks
        pass
    return True


def _busy(folder: Path, who: str) -> str:
    return f"{folder.parent}: {who} is at work there. Wait until it ends, or choose another workdir."
