"""One hostile or hasty input, in a process of its own and in a folder of its own, and what came of it.

typed: an error of ours. right: a result, and the input's own check of it held. foreign: another error, a crash, a hang.
wrong: a result that isn't right, or something of the process left changed. lost: a file of the user's that is no longer
what it was. executed: a file that nothing but foreign code writes. The last four must not happen.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from thesean.errors import TheseanError

VERDICTS = ("typed", "right", "foreign", "wrong", "lost", "executed")
BAD = VERDICTS[2:]

# Takes an empty folder. Raises one of our errors, or returns when all is right, or `Wrong`.
Call = Callable[[Path], Any]
Inputs = Mapping[str, Call]

CANARY = "executed"  # of the folder: what foreign code would write
MINE = "notes.txt"  # of the folder: the user's, whatever happens

_SECONDS = 90
_BYTES = 6 * 2**30  # of addresses beyond what the process has at the start: a bomb fails, and the machine lives


class Wrong(AssertionError):
    """A result that isn't right."""


class Lost(AssertionError):
    """Something of the user's is no longer what it was."""


def check(holds: Any, told: str) -> None:
    """Raises Wrong unless it holds."""
    if not holds:
        raise Wrong(told)


def only_typed(call: Call) -> Call:
    """For what no result can be right for."""

    def calling(folder: Path) -> None:
        found = call(folder)
        raise Wrong(f"expected an error, found {str(found)[:80]!r}")

    return calling


def tried(call: Call) -> tuple[str, str]:
    """Verdict and what was said."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        (folder / MINE).write_text("mine")
        verdict, said = _apart(call, folder)
        if (folder / CANARY).exists():
            return "executed", said
        if not (folder / MINE).exists() or (folder / MINE).read_text() != "mine":
            return "lost", said
        return verdict, said
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _apart(call: Call, folder: Path) -> tuple[str, str]:
    """In a fork, which has all that this process has imported. No thread of torch may have been started here."""
    answer, question = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        try:
            found = _in_child(call, folder)
            with os.fdopen(question, "w") as file:
                json.dump(found, file)
        finally:
            os._exit(0)
    os.close(question)
    with os.fdopen(answer) as file:
        late = _wait(child)
        said = file.read()
    if late:
        return "foreign", f"still running after {_SECONDS} s"
    if not said:
        return "foreign", "the process died"
    verdict, words = json.loads(said)
    return verdict, words


def _wait(child: int) -> bool:
    """Whether it had to be killed."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _in_child(call: Call, folder: Path) -> tuple[str, str]:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    tempfile.tempdir = None
    os.chdir(folder)
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + _BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _process()
    try:
        call(folder)
        verdict, said = "right", ""
    except TheseanError as error:
        verdict, said = "typed", f"{type(error).__name__}: {error}"
    except (Wrong, Lost) as error:
        verdict, said = type(error).__name__.lower(), str(error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "thesean/" in f.filename), "")
        verdict, said = "foreign", f"{type(error).__name__}: {error} ({place})"
    if verdict in ("typed", "right") and (changed := [k for k, v in _process().items() if before[k] != v]):
        return "wrong", f"left changed: {', '.join(changed)}"
    if verdict == "typed" and not said.partition(": ")[2].strip():
        return "wrong", "an error without a word"
    return verdict, said[:400]


def _process() -> dict[str, Any]:
    """What a call must leave as it found it."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "random state": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
        "umask": _umask(),
    }


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found
