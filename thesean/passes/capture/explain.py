"""Why a guide can't be traced, in the caller's terms: the line of their code, and what to do about it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from thesean.errors import CaptureError
from thesean.passes.capture.dynamic import Dynamic

# torch.export's own words for a size that it was to leave free, and the code fixes
_FIXED = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
# what stands in the error or the line, and what to do about it
_MENDS = (
    ("functions with out=", "A graph writes into nothing that is given: take what the function returns, without out=."),
    (".numpy() is not supported", "numpy computes outside of the graph: write that line with torch's own operators."),
    (": assert ", "A check of values can't become a graph: leave it out, or make it one of shapes."),
    ("specialized integer", "A length that hangs on values can't become a graph: keep the full one, with a mask."),
)
_PACKS = {"pack_padded_sequence", "pad_packed_sequence"}
# and for what is returned beside tensors
_RETURNED = re.compile(r"Found <class '[\w.]*?(\w+)'> in output")


def explained(
    error: Exception,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any],
    dynamic: Dynamic,
) -> CaptureError:
    """What to raise for a failed trace. Runs the guide once more where a size that it fixes has to be found."""
    fixed = [place for place in fixed_sizes(error) if place[0] in inputs]
    if fixed:
        return CaptureError(_fixed_size(fixed, model, inputs, constants, dynamic))
    if found := _RETURNED.search(str(error)):
        return CaptureError(returned(found[1]))
    if _packs(error):
        return CaptureError(
            f"the guide can't be captured{where_of(error)}: packed sequences take lengths as plain numbers. Give the "
            "cell the padded sequences, and hide what is padded behind it by a mask, (torch.arange(x.shape[1]) < "
            "lengths[:, None])[..., None], which is exact for what reads forwards; or convert a submodule instead."
        )
    if "fake tensor in the exported program constant" in str(error):
        return CaptureError(
            "the guide can't be captured: its forward reads a weight's .data, or makes a tensor that the trace loses. "
            "Write weight.detach() where no gradient is wanted, and the weight itself where one is."
        )
    line, told = where_of(error), f"the guide can't be captured{where_of(error)}: {short(error)}."
    if mend := next((mend for sign, mend in _MENDS if sign in str(error) or sign in line), ""):
        return CaptureError(f"{told} {mend}")
    if isinstance(error, NotImplementedError):
        return CaptureError(
            f"{told} torch has no such form of {_called(error) or 'an operator'}: have forward use another one there, "
            "for an attention scaled_dot_product_attention with its mask, or convert a submodule without it."
        )
    if isinstance(error, TypeError):  # torch is used wrongly
        return CaptureError(f"{told} Convert a submodule instead, or write that line with other operators.")
    numbers = "" if isinstance(error, NameError) else " Nor can a value as a plain number: leave out float(), .item()."
    return CaptureError(
        f"{told} Control flow that depends on values can't become a graph: convert a submodule instead, or replace the "
        f"branch by torch.where.{numbers}"
    )


def returned(name: str) -> str:
    """What to say where a guide returns an object of a class of that name."""
    return (
        f"the guide returns a {name}, and a graph gives tensors alone. Have it return no more than those: "
        "use_cache=False where forward calls a model that keeps a cache, or a wrapper that returns what it needs."
    )


def _packs(error: Exception) -> bool:
    """Whether the trace ended where packed sequences are made, read or undone."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    held = any(isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values())
    return held or not _PACKS.isdisjoint(frame.f_code.co_name for frame in frames)


def fixed_sizes(error: Exception) -> list[tuple[str, int]]:
    """Inputs and dimensions that were to be free, and the guide's code fixes: all that a failed trace tells."""
    if "Constraints violated" not in str(error):
        return []
    return [(name, int(dim)) for name, dim in dict.fromkeys(_FIXED.findall(str(error)))]


def _fixed_size(
    fixed: list[tuple[str, int]],
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any],
    dynamic: Dynamic,
) -> str:
    """Names the dimensions and, where another size shows it, the line."""
    names = [f"dimension {dim} of {name} ({dynamic[name].get(dim, 'fixed')})" for name, dim in fixed]
    first, along = fixed[0]
    size = inputs[first].shape[along]
    line, by_len = _line_that_fixes(fixed, model, inputs, constants)
    mend = "len(x) is a plain number: write x.shape[0]. " if by_len else ""
    kept = {k: {d: n for d, n in dims.items() if (k, d) not in fixed} for k, dims in dynamic.items()}
    kept = {k: dims for k, dims in kept.items() if dims}
    other = f"dynamic={kept!r} keeps it fixed, dynamic={{}} fixes all sizes" if kept else "dynamic={} fixes all sizes"
    return (
        f"the guide's code fixes {' and '.join(names)} at {size}, the example's size{line}. {mend}Take sizes from the "
        f"input's shape, so that any will do; or {other}."
    )


def _line_that_fixes(
    fixed: list[tuple[str, int]], model: nn.Module, inputs: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> tuple[str, bool]:
    """Where the guide asks for a length as a plain number, or fails at another size; and whether it is the former."""
    longer = {name: value.clone() for name, value in inputs.items()}
    for name, dim in fixed:
        value = longer[name]
        longer[name] = torch.cat([value, value.narrow(dim, 0, 1)], dim)
    with _watching_len() as seen, torch.no_grad():
        try:
            model(**longer, **constants)
        except Exception as error:
            return where_of(error), False
    return (seen[0], True) if seen else ("", False)


@contextmanager
def _watching_len() -> Iterator[list[str]]:
    """The lines that ask for a tensor's length while this runs."""
    seen: list[str] = []
    original = torch.Tensor.__len__

    def watched(self: torch.Tensor) -> int:
        seen.append(_line(traceback.extract_stack()[:-1]))
        return original(self)

    torch.Tensor.__len__ = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        torch.Tensor.__len__ = original  # type: ignore[method-assign]
        seen[:] = [line for line in seen if line]


def where_of(error: BaseException) -> str:
    """` at file.py, line 12, in forward: if h.sum() > 0:`, the innermost frame outside of torch and Thesean."""
    seen: BaseException | None = error
    while seen is not None:
        if line := _line(traceback.extract_tb(seen.__traceback__)):
            return line
        seen = seen.__cause__ or seen.__context__
    return ""


def _called(error: BaseException) -> str:
    """torch's function that the innermost line outside of it called, "" where none was entered."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [at for at, frame in enumerate(frames[:-1]) if _line([frame])]
    return frames[own[-1] + 1].name if own else ""


def _line(stack: traceback.StackSummary | list[traceback.FrameSummary]) -> str:
    here = str(Path(__file__).resolve().parents[2])
    torch_home = str(Path(torch.__file__).resolve().parent)
    for frame in reversed(stack):
        if not frame.filename.startswith((here, torch_home, "<")) and "contextlib" not in frame.filename:
            return f" at {frame.filename}, line {frame.lineno}, in {frame.name}: {(frame.line or '').strip()}"
    return ""


def short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(".")
