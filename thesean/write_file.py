"""A file takes its name when it is whole and on the disk; until then, whatever fails, the earlier file stays."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from thesean.errors import WriteError
from thesean.scratch import followed, leftovers, named, remove, scratch, sync, telling

# What a shell hands over is written into, not replaced.
_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/.*)|/proc/.*")


def write_text(path: Any, text: str, parents: bool = False) -> Path:
    """Write UTF-8. `parents`: make the folders above. Raises WriteError, which names path and reason."""
    path = named(path)
    if _is_stream(path):
        with telling(path):
            path.write_text(text, encoding="utf-8")
        return path
    with new_file(path, parents) as made:
        made.write_text(text, encoding="utf-8")
    return path


@contextmanager
def new_file(path: Any, parents: bool = False) -> Iterator[Path]:
    """Where to write what becomes `path` at the end; after an error all is as it was. A link is followed, the modes of
    an earlier file are kept, and one that may not be written is refused.

    Raises WriteError, for an OSError inside too.
    """
    path = named(path)
    with telling(path):
        target = followed(path)
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        mode = mode_kept(target)
        for left in leftovers(target):
            remove(left)
        with scratch(target) as folder:
            made = made_in(folder, target)
            yield made
            if mode is not None:
                made.chmod(mode)
            sync(made)
            made.replace(target)


@contextmanager
def full_is_an_oserror() -> Iterator[None]:
    """safetensors writes in Rust and has an error of its own for all that a disk says."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error).removeprefix("Error while serializing: ")) from error


def made_in(folder: Path, target: Path) -> Path:
    """The draft of `target` in a scratch folder, with its ending, by which some writers go."""
    return folder / f"made{target.suffix if len(target.suffix) < 16 else ''}"


def mode_kept(target: Path) -> int | None:
    """The modes of the file that will be replaced, if there is one. Raises OSError, WriteError where it must not be."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(target))
    if not stat.S_ISREG(found.st_mode):
        raise WriteError(f"can't write {target}: it is no file. Choose another name.")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return stat.S_IMODE(found.st_mode)


def _is_stream(path: Path) -> bool:
    """A terminal, a pipe or the like, which takes what is written and can't be replaced. Raises WriteError."""
    with telling(path):
        if _STREAMS.fullmatch(str(path)):
            return True
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
