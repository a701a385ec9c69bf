"""Which implementation of an operation runs: the torch reference, or the Triton kernel in the file beside it.

The file name is the registry: `cka_triton.py` next to `cka.py`, defining a function `cka`, is the Triton kernel of the
operation "cka"; `cka_distance`, a variant of it, stands in the same two files. A kernel is imported at its first use
only, so that triton is needed by those who ask for it and no one else.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from thesean.errors import MissingExtraError, unknown_name

Backend = Literal["auto", "torch", "triton"]


def has_kernel(op: str) -> bool:
    """Whether a Triton kernel of `op` exists. Imports nothing of it."""
    return importlib.util.find_spec(f"thesean.kernels.{op}_triton") is not None


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(backend: Backend, op: str, device: torch.device | None = None) -> Literal["torch", "triton"]:
    """The implementation of `op` that runs for tensors on `device`.

    "auto" takes Triton for CUDA tensors where a kernel and triton are there, torch otherwise. Asking for "triton" never
    falls back silently. Raises UnknownNameError for an unknown backend, ValueError when `op` has no Triton kernel, and
    MissingExtraError when triton is not installed.
    """
    if backend not in get_args(Backend):
        raise unknown_name("backend", backend, get_args(Backend))
    if backend == "torch":
        return "torch"
    if backend == "auto":
        on_gpu = device is not None and device.type == "cuda"
        return "triton" if on_gpu and has_kernel(op) and has_triton() else "torch"
    if not has_kernel(op):
        raise ValueError(f"{op}: no Triton kernel is registered. Use backend='torch' or backend='auto'.")
    if not has_triton():
        raise MissingExtraError("triton", "kernels")
    return "triton"


def load(op: str, variant: str | None = None) -> Callable[..., Any]:
    """The Triton kernel's function: `op`, or a `variant` of it, in `thesean.kernels.<op>_triton`."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"thesean.kernels.{op}_triton"), variant or op)
    return function
