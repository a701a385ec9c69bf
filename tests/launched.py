"""Processes of one run, started as `torchrun` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(**more: str) -> dict[str, str]:
    """Of a process with one thread that finds what this one finds."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def launch(
    count: int, arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` as ranks 0 to `count` - 1 of one run on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(count):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = environment(**{k: str(v) for k, v in ours.items()}, **(env or {}))
        command = [sys.executable, *arguments]
        found.append(
            subprocess.Popen(command, env=given, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return found


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 150) -> list[tuple[int, str]]:
    """Exit codes and what was said on stderr; whoever hasn't ended by then is killed, and that is an error."""
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()
