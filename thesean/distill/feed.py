"""From the user's data, or from nothing, to batches to train on, batches held out, and the shapes of both."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thesean.distill.data import Batches, check_readable, example_of, synthetic
from thesean.distill.evaluate import Batch
from thesean.passes.capture import Captured

# Held-out batches that stages are judged by; a whole evaluation set would cost more than the stages
_STAGE_BATCHES = 4
_SYNTHETIC_BATCHES, _SYNTHETIC_SIZE, _SYNTHETIC_LENGTH = 16, 8, 64


@dataclass(frozen=True, kw_only=True)
class Feed:
    """`first` is the first batch as it came; `length` that of its sequences, None where there is no time."""

    batches: Batches
    held_out: list[Batch]
    first: Any
    length: int | None


def example_inputs_of(model: nn.Module, data: Iterable[Any] | None, example_inputs: Any) -> Any:
    if example_inputs is not None:
        return example_inputs
    if data is not None:
        check_readable(data)
        return example_of(next(iter(data)))
    return getattr(model, "dummy_inputs", None)


def make_feed(
    captured: Captured,
    data: Iterable[Any] | None,
    eval_data: Iterable[Any] | None,
    example_inputs: Any,
    seed: int,
    notes: list[str],
) -> Feed:
    """Warns, and adds to `notes`, where no data was given. Raises DataError for batches that don't fit."""
    signature = captured.signature
    device = next(iter(captured.example.values())).device
    synthesised = data is None
    if data is None:
        sizes = signature.check(captured.example)
        if example_inputs is None:  # a model's dummy inputs are too few to solve for anything
            length = _longest(captured)
            sizes = {k: _SYNTHETIC_SIZE if k.startswith("batch") else length for k in sizes}
        shapes = ", ".join(f"{k} {v}" for k, v in sizes.items())
        told = (
            f"no data given: parts are aligned on synthetic inputs ({shapes}). The figures say nothing about real "
            "data; pass data=."
        )
        warnings.warn(told, UserWarning, stacklevel=5)
        notes.append(told)
        data = synthetic(signature, sizes, device, _SYNTHETIC_BATCHES, seed)
    held_source = eval_data
    if held_source is None and isinstance(data, (list, tuple)) and len(data) >= 8:
        count = min(_STAGE_BATCHES, len(data) // 8)
        data, held_source = data[:-count], data[-count:]
        if not synthesised:
            notes.append(f"no eval_data given: the last {count} batches of data were held out")
    batches = Batches(data, signature, device)
    if held_source is None:
        held_out = batches.first(_STAGE_BATCHES)
        notes.append("no eval_data given: measured on training batches")
    else:
        held_out = list(Batches(held_source, signature, device))
    first, inputs = batches.first(1)[0]
    return Feed(batches=batches, held_out=held_out, first=first, length=signature.check(inputs).get("time"))


def _longest(captured: Captured) -> int:
    """A useful synthetic length that the guide can still run: shorter than the default where its tables are."""
    length = _SYNTHETIC_LENGTH
    device = str(next(iter(captured.example.values())).device)
    while length > 2:
        try:
            with torch.no_grad():
                sized = {k: 2 if k.startswith("batch") else length for k in captured.signature.symbols}
                captured.graph_module(**captured.signature.random_inputs(sized, device=device))
            return length
        except (IndexError, RuntimeError):
            length //= 2
    return length
