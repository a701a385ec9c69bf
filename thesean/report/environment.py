"""Where figures were measured: a benchmark without its machine is not a figure."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "onnxruntime", "onnx", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Python, package versions, processor, cores, threads, the working directory's git commit, and the date (UTC).

    JSON values only. Packages that aren't installed are left out; `commit` is None outside a git repository and ends
    in "-dirty" when tracked files differ from it.
    """
    return {
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # a kernel may be ten times faster with AVX512
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    """From the packages' metadata: importing onnxruntime to read its version would cost seconds."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's marketing name. `platform.processor()` is empty or "x86_64" on Linux."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model", "hardware") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores that this process may use: a container often sees more than it gets."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str | None:
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
