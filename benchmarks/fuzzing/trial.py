"""One altered folder: loaded, called, looked at, saved and loaded again; and whether the process is as it was."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import thesean
from benchmarks.fuzzing.altered import Altered
from thesean.errors import ArtifactError, TheseanError

# What a folder may not have done: told by the interpreter itself (PEP 578).
_NEVER = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.",
    "ctypes.dlopen", "urllib.", "webbrowser.", "os.putenv", "os.chdir", "os.kill", "ftplib.",
)  # fmt: skip
_CHANGES = ("os.chmod", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Watch:
    """Notes what is done while `place` is named, beyond reading and beyond that folder. A process keeps it for good.

    `dlopen(None)` is the process itself: an exchange of two names is asked for there. What a run may need was imported
    before: no further package may be, and a further module of one does nothing but be read (`marshal.loads`).
    """

    def __init__(self) -> None:
        self.place = ""
        self.found: list[str] = []
        self.modules = set(sys.modules)
        self.packages = _packages(self.modules) | sys.stdlib_module_names
        sys.addaudithook(self._told)

    def executed(self) -> list[str]:
        """What may not be, the packages last that were not there before: not every way to import tells of itself."""
        new = _packages(sys.modules.keys() - self.modules) - self.packages
        return [*self.found, *(f"import {name}" for name in sorted(new))]

    def _told(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.place:
            return
        if event.startswith(_NEVER) and args != (None,):
            self.found.append(f"{event} {args!r:.100}")
        if event == "marshal.loads" and not _importing():
            self.found.append(event)
        changes = event.startswith(_CHANGES) or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES)
        if changes and not self._may(args[0]):
            self.found.append(f"{event} {args!r:.100}")

    def _may(self, path: Any) -> bool:
        """Change what is in the folder, what a descriptor names, and Python's own caches of what it imports."""
        return (
            isinstance(path, int)
            or str(path).startswith(self.place)
            or str(path) == os.devnull
            or "__pycache__" in str(path)
        )


def _packages(modules: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def _importing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def state() -> tuple[Any, ...]:
    """Of the process: what no folder may change."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        torch.get_default_device(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().numpy().tobytes(), torch.is_autocast_enabled("cpu"), os.getcwd(),
    )  # fmt: skip


def outcome(chain: tuple[int, ...], watch: Watch | None = None, is_loaded: Callable[[], None] = lambda: None) -> str:
    """What comes of one altered folder: "refused: ...", "loaded", "late: ...", or a fault: "foreign: ...",
    "wrong: ...", "executed: ...", "changed: ...". `is_loaded` is called once it is loaded.
    """
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "saved"
        Altered(chain).write(folder)
        before = state()
        if watch is not None:
            watch.place, watch.found = place, []
        try:
            found = _found(folder, is_loaded)
        finally:
            if watch is not None:
                watch.place = ""
        if watch is not None and (executed := watch.executed()):
            return f"executed: {executed[0]}"
        if state() != before:
            return f"changed: {[(a, b) for a, b in zip(before, state(), strict=True) if a != b]!r:.200}"
        return found


def _found(folder: Path, is_loaded: Callable[[], None]) -> str:
    try:
        loaded = thesean.load(folder)
    except ArtifactError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"foreign: load: {_short(error)}"
    is_loaded()
    late, outputs = "", []
    example = loaded.signature.example_sizes
    for more in (0, 1):
        sizes = {s: example.get(s, 4) + more for s in loaded.signature.symbols}
        try:
            inputs = loaded.signature.random_inputs(sizes)
            with torch.no_grad():
                outputs.append((inputs, loaded(**inputs)))
        except TheseanError:
            continue
        except Exception as error:
            late = late or f"late: {_short(error)}"
    try:
        str(loaded.report), str(loaded.plan), repr(loaded.signature)
        again = thesean.load(loaded.save(folder.with_name("again")))
    except TheseanError as error:
        return late or f"loaded, and can't be saved: {error}"
    except Exception as error:
        return f"foreign: looked at, saved: {_short(error)}"
    for inputs, output in outputs:
        with torch.no_grad():
            if not _same(output, again(**inputs)):
                return "wrong: loaded again it gives something else"
    return late or "loaded"


def _same(one: Any, other: Any) -> bool:
    """To the bit: NaN is NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or one != one)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def kind(text: str) -> str:
    """An outcome's words without what is a run's own: names, numbers, paths."""
    text = re.sub(r"/\S+|'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}", "#", text)
    return re.sub(r"[-+]?\d[\d,.e+-]*|\b\w*_\w*\b|\b[\w]+\.[\w.]+\b", "#", text)[:120]


if __name__ == "__main__":
    print(outcome(tuple(map(int, sys.argv[1:]))))
