"""How a file may be written, and what is told of one that was."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch

from thesean.deploy.lowering.choose_operators import Operators, parse_operators
from thesean.deploy.onnx_file import Draft
from thesean.deploy.parity import Check, largest
from thesean.deploy.quantizing.quantized import Quantized
from thesean.deploy.quantizing.samples import Samples
from thesean.deploy.quantizing.tools import Quantize
from thesean.errors import ExportError
from thesean.passes.thread_state import STATE_IN, STATE_OUT

_FEW = 3  # states that are told by name

# Errors of a file, of the output's scale, by its precision: the orders of sums differ, and in float16 each step rounds.
PARITY = {torch.float32: 1e-4, torch.float16: 3e-2}

Stateful = Literal["auto", "yes", "no"] | bool
Checking = Literal["all", "skip"]
Runtime = Literal["onnxruntime", "genai", "portable"]


# Endings of what others write; a file of ours by such a name would be taken for one.
_OTHERS = (
    ".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".ort", ".gguf", ".tflite", ".engine", ".plan", ".xml", ".mlmodel",
    ".mlpackage",
)  # fmt: skip


class FileForm(TypedDict, total=False):
    """How a file is written, beside what it computes: what a caller of Thesean's may ask for. `operators` are those of
    linear attention: see `lowering.choose_operators`.
    """

    dtype: torch.dtype | str | None
    external_data: bool | None
    check: Checking
    quantize: Quantize | None
    runtime: Runtime
    operators: Operators
    tokenizer: Any


class GuideForm(FileForm, total=False):
    """With what `Converted.export` takes by itself."""

    opset: int | None
    tolerance: float | None


class Form(FileForm, total=False):
    """All of it; `into` is a draft that the caller publishes."""

    about: Mapping[str, str]
    samples: Samples | None
    into: Draft | None


def check_runtime(runtime: Any, tokenizer: Any, path: Path, form: Form) -> Runtime:
    """Raises ExportError for one that isn't known, for what is nothing to it, and for a name of another form."""
    known, operators = get_args(Runtime), parse_operators(form.get("operators", "auto"))
    if runtime not in known:
        raise ExportError(f"runtime: expected one of {', '.join(known)}, found {runtime!r}.")
    if tokenizer is not None and runtime != "genai":
        raise ExportError("tokenizer: only a folder for runtime='genai' has one. Leave it out, or ask for that.")
    if runtime == "portable" and operators != "auto":
        raise ExportError(f"operators={operators!r}: runtime='portable' has products alone. Leave it out.")
    if runtime == "portable" and form.get("quantize") is not None:
        raise ExportError("quantize: its operators are onnxruntime's own; leave it out for runtime='portable'.")
    if runtime != "onnxruntime" and path.suffix == ".pt2":
        raise ExportError(f"{path}: runtime={runtime!r} is for ONNX. Leave it out, or give another name.")
    if runtime == "genai" and path.suffix == ".onnx":
        raise ExportError(f"{path}: runtime='genai' makes a folder, the model inside; expected a folder's name.")
    ending = path.suffix.lower()
    if ending in _OTHERS or (ending == ".pt2" and path.suffix != ending):
        raise ExportError(
            f"{path}: expected a name that ends in .onnx or .pt2, found {path.suffix}: only ONNX and torch's own form "
            "are written."
        )
    found: Runtime = runtime
    return found


def parse_stateful(stateful: Stateful) -> bool | None:
    """True, False, or None for "auto". Raises ExportError."""
    known: dict[Stateful, bool | None] = {"auto": None, "yes": True, "no": False, True: True, False: False}
    if not isinstance(stateful, Hashable) or stateful not in known:
        raise ExportError(f"stateful: expected 'auto', 'yes', 'no', True or False, found {stateful!r}.")
    return known[stateful]


def check_words(form: Form) -> None:
    """Raises ExportError for a `check` and an `external_data` that mean nothing."""
    if (checked := form.get("check", "all")) not in get_args(Checking):
        raise ExportError(f"check: expected one of {', '.join(get_args(Checking))}, found {checked!r}.")
    if (beside := form.get("external_data")) not in (None, True, False):
        raise ExportError(f"external_data: expected True, False or None, found {beside!r}.")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """What a file's precision is asked for as. Raises ExportError for one that files don't have."""
    if isinstance(dtype, str):  # "float16", as a report writes it
        dtype = getattr(torch, dtype, None) if isinstance(getattr(torch, dtype, None), torch.dtype) else dtype
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in PARITY):
        raise ExportError(
            f"dtype: expected torch.float32 or torch.float16, found {dtype}: onnxruntime has few kernels of others on "
            "a CPU. Leave it out for a float32 file, whatever the network's own precision is."
        )
    return dtype


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A file and what was seen of it; its `opset` is 0 where it is no ONNX. Errors in `checks` are relative to the
    output's scale, none above `tolerance`.

    `weights` is the file beside it that holds them, None where they are inside; `bytes` counts both. `delay`: how many
    steps late the outputs of a stream whose parts look ahead come. `operators`: how linear attention is written,
    "fused" or "products", "" where there is none. `encoder`: of the file beside a decoder's that makes its source what
    it reads; the `checks` of this one are of both together as well.
    """

    path: Path
    bytes: int
    opset: int
    stateful: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    checks: tuple[Check, ...]
    tolerance: float
    seconds: float
    note: str = ""
    delay: int = 0
    dtype: str = "float32"
    weights: Path | None = None
    operators: str = ""
    quantized: Quantized | None = None
    encoder: ExportReport | None = None

    def __str__(self) -> str:
        kind = "with state" if self.stateful else "without state"
        told = kind if self.dtype == "float32" else f"{self.dtype}, {kind}"
        form, runtime = (f"opset {self.opset}", "onnxruntime") if self.opset else ("a graph of torch's", "torch")
        lines = [
            f"wrote {self.path}: {self.bytes / 1e6:.2f} MB, {form}, {told}, {self.seconds:.1f} s",
            f"  inputs {_listed(self.inputs, STATE_IN)}; outputs {_listed(self.outputs, STATE_OUT)}",
            f"  {len(self.checks)} checks in {runtime}; {largest(self.checks)}, tolerance {self.tolerance:.0e}",
        ]
        if self.delay:
            lines.insert(2, f"  outputs come {self.delay} steps late: {self.delay} more, not seen, bring the last ones")
        if self.weights is not None:
            lines.insert(1, f"  the weights are in {self.weights.name}, beside it: move both together")
        if self.quantized is not None:
            lines.append(str(self.quantized))
        beside = [f"its encoder: {self.encoder}"] if self.encoder is not None else []
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else []), *beside])


def _listed(names: Sequence[str], state: str) -> str:
    """All names; of more than a few states, which begin with `state`, the first and the last."""
    states = [name for name in names if name.startswith(state)]
    told = states if len(states) <= _FEW else [f"{states[0]} to {states[-1]}"]
    return ", ".join([*(name for name in names if name not in states), *told])
