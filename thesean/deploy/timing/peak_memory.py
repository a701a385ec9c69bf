"""How much memory a file takes while it runs: in a process of its own, which has nothing but numpy and onnxruntime.

It runs as a script, since importing this package would take longer, and more memory, than most files do.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]

logger = logging.getLogger(__name__)

_IN, _OUT = "state_in_", "state_out_"  # thesean.passes.thread_state's, which the script can't import
_SHARE = 0.6
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """`peak_mib` over what the process takes with onnxruntime loaded and no file, weights included; None where the
    system doesn't tell. `state_bytes` of the states after the run, 0 where the file has none.
    """

    peak_mib: float | None
    state_bytes: int


def footprints(path: str | Path, runs: Sequence[tuple[Arrays, Arrays | None]]) -> list[Footprint | None]:
    """What one file takes on one thread, run after run: each is all inputs of a whole sequence, its first states among
    them, and, or None, the inputs of one step after it. A peak counts from the start, so give the smallest runs first;
    None from the first run on that fails, such as for want of memory: the process may have most of what is free.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, pair in enumerate(runs):
            for what, arrays in zip(("whole", "step"), pair, strict=True):
                files.append(f"{folder}/{number}_{what}.npz" if arrays is not None else "")
                if arrays is not None:
                    np.savez(files[-1], **arrays)  # type: ignore[arg-type]  # numpy's stubs read the names as options
        command = [sys.executable, "-P", __file__, str(Path(path).resolve()), *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        logger.info("%s ran %d times of %d: %s", path, len(done.stdout.splitlines()), len(runs), done.stderr[-300:])
    found: list[Footprint | None] = [Footprint(**json.loads(line)) for line in done.stdout.splitlines()]
    return found + [None] * (len(runs) - len(found))


def main(path: str, *files: str) -> None:
    """A line of JSON a run."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    _leave_some()
    before = _restart()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    for whole, step in zip(files[::2], files[1::2], strict=True):
        found: dict[str, Any] = dict(zip(names, session.run(names, dict(np.load(whole))), strict=True))
        states = {_IN + n.removeprefix(_OUT): v for n, v in found.items() if n.startswith(_OUT)}
        if step:
            session.run(names, {**np.load(step), **states})
        peak = None if before is None else (_peak() or before) - before
        print(json.dumps({"peak_mib": peak, "state_bytes": sum(v.nbytes for v in states.values())}), flush=True)


def _leave_some() -> None:
    """From here on what is more than this share of the free memory is refused, before others have none left."""
    with suppress(ImportError, OSError, StopIteration, ValueError):
        import resource

        free = _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 2**10
        most = _kilobytes(_STATUS, "VmSize") * 2**10 + int(_SHARE * free)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _kilobytes(file: Path, name: str) -> int:
    lines = file.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def _restart() -> float | None:
    """What the process holds now; from here on its peak counts, where the system can start it anew."""
    with suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")
    return _peak()


def _peak() -> float | None:
    """The most that this process has held, in MiB."""
    with suppress(OSError, StopIteration):
        return _kilobytes(_STATUS, "VmHWM") / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    size: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main(*sys.argv[1:])
