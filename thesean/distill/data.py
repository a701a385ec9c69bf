"""The user's batches, checked and read in one way: tensors, tuples (x, y) or dicts, as many times as asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from thesean.distill.task import Batch
from thesean.errors import DataError
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.signature import Signature

# What a Hugging Face batch carries for the loss alone; read by the graph only if the example inputs had it.
LABELS = ("labels", "label", "label_ids")


@dataclass(frozen=True)
class Batches:
    """`data` seen through the guide's signature. Raises DataError for what does not fit, with the batch's number."""

    data: Iterable[Any]
    signature: Signature
    device: torch.device

    def __post_init__(self) -> None:
        check_readable(self.data)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
        """Pairs of the batch as it came and the graph's inputs in it."""
        for number, batch in enumerate(self.data):
            try:
                inputs = named_inputs(batch, self.signature)
                self.signature.check(inputs)
            except DataError as error:
                raise DataError(f"batch {number}: {error}") from None
            for name, value in inputs.items():
                if value.device != self.device:
                    raise DataError(
                        f"batch {number}: {name!r} is on {value.device}, the guide on {self.device}. Move one of them."
                    )
            # autograd can't save tensors that were made in inference mode
            yield batch, {k: v.clone() if v.is_inference() else v for k, v in inputs.items()}

    def first(self, count: int) -> list[tuple[Any, dict[str, torch.Tensor]]]:
        """At most `count` batches of one pass."""
        return list(itertools.islice(self, count))


def check_readable(data: Any) -> None:
    """Raises DataError unless `data` is an iterable of at least one batch that can be read again."""
    if isinstance(data, Iterator):
        raise DataError(
            "data is an iterator, which can be read only once. Pass a list or a DataLoader, or an object whose "
            "__iter__ starts anew."
        )
    if isinstance(data, torch.Tensor):
        raise DataError("data is one tensor; expected an iterable of batches. Wrap it: data=[x].")
    if not isinstance(data, Iterable):
        raise DataError(f"data is a {type(data).__name__}; expected an iterable of batches.")
    if next(iter(data), None) is None:
        raise DataError("data is empty: expected at least one batch.")


def named_inputs(batch: Any, signature: Signature) -> dict[str, torch.Tensor]:
    """The graph's inputs in a batch: a dict by name; of a tuple the first element, or the first few."""
    names = [s.name for s in signature.inputs]
    if isinstance(batch, torch.Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping):
        missing = [n for n in names if n not in batch]
        if missing:
            raise DataError(f"no input {missing[0]!r} in the batch, which has: {', '.join(map(str, batch))}.")
        return {n: batch[n] for n in names}
    if isinstance(batch, (tuple, list)):
        first = batch[0] if batch else None
        if isinstance(first, Mapping):
            return named_inputs(first, signature)
        if isinstance(first, (tuple, list)):
            batch = first
        if len(batch) < len(names):
            raise DataError(f"expected {len(names)} inputs ({', '.join(names)}), found {len(batch)} in the batch.")
        return dict(zip(names, batch, strict=False))
    raise DataError(f"expected a tensor, a tuple (x, y) or a dict, found {type(batch).__name__}.")


def example_of(batch: Any) -> Any:
    """Example inputs in a first batch: a dict without its labels, or x of (x, y)."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k not in LABELS}
    if isinstance(batch, (tuple, list)) and batch:
        return example_of(batch[0]) if isinstance(batch[0], (Mapping, tuple, list)) else (batch[0],)
    return batch


def integer_labels(batch: Any) -> bool:
    """Whether the batch carries class labels: integers in y of (x, y) or under a label key."""
    if isinstance(batch, Mapping):
        found = [batch[k] for k in LABELS if k in batch]
    else:
        found = list(batch[1:]) if isinstance(batch, (tuple, list)) else []
    return any(isinstance(y, torch.Tensor) and not y.is_floating_point() for y in found)


def synthetic(signature: Signature, sizes: dict[str, int], device: torch.device, batches: int, seed: int) -> list[Any]:
    """Random inputs of the guide's shapes, as dicts."""
    return [signature.random_inputs(sizes, seed=seed * 1000 + i, device=str(device)) for i in range(batches)]


# Held-out batches that stages are judged by; a whole evaluation set would cost more than the stages
_STAGE_BATCHES = 4


_SYNTHETIC_BATCHES, _SYNTHETIC_SIZE, _SYNTHETIC_LENGTH = 16, 8, 64


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Batches to train on, each time from the start, and batches held out. `first` is the first one as it came,
    `length` that of its sequences, None where there is no time. `notes` say where they are from, `warnings` what a
    person should know before anything is trained on them.
    """

    batches: Iterable[Batch]
    held_out: Sequence[Batch]
    first: Any
    length: int | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def stream(self) -> Iterator[Batch]:
        """Pass after pass; one place in the data for all phases of a run."""
        return self._forever()

    def _forever(self) -> Iterator[Batch]:
        while True:
            yield from self.batches

    def take(self, count: int) -> list[Batch]:
        """At most `count` batches of one pass, from its start."""
        return list(itertools.islice(self.batches, count))


def example_inputs_of(model: nn.Module, data: Iterable[Any] | None, example_inputs: Any) -> Any:
    if example_inputs is not None:
        return example_inputs
    if data is not None:
        check_readable(data)
        return example_of(next(iter(data)))
    return getattr(model, "dummy_inputs", None)


def make_feed(
    captured: Captured, data: Iterable[Any] | None, eval_data: Iterable[Any] | None, example_inputs: Any, seed: int
) -> Feed:
    """Without data, random inputs of the guide's shapes, and a warning. Raises DataError for batches that don't fit."""
    signature = captured.signature
    device = next(iter(captured.example.values())).device
    notes: list[str] = []
    warnings: list[str] = []
    if data is None:
        sizes = signature.check(captured.example)
        if example_inputs is None:  # a model's dummy inputs are too few to solve for anything
            length = _longest(captured)
            sizes = {k: _SYNTHETIC_SIZE if k.startswith("batch") else length for k in sizes}
        shapes = ", ".join(f"{k} {v}" for k, v in sizes.items())
        warnings.append(
            f"no data given: parts are aligned on synthetic inputs ({shapes}). The figures say nothing about real "
            "data; pass data=."
        )
        data = synthetic(signature, sizes, device, _SYNTHETIC_BATCHES, seed)
    held_source = eval_data
    if held_source is None and isinstance(data, (list, tuple)) and len(data) >= 8:
        count = min(_STAGE_BATCHES, len(data) // 8)
        data, held_source = data[:-count], data[-count:]
        if not warnings:
            notes.append(f"no eval_data given: the last {count} batches of data were held out")
    batches = Batches(data, signature, device)
    if held_source is None:
        held_out = batches.first(_STAGE_BATCHES)
        notes.append("no eval_data given: measured on training batches")
    else:
        held_out = list(Batches(held_source, signature, device))
    first, inputs = batches.first(1)[0]
    return Feed(
        batches=batches,
        held_out=held_out,
        first=first,
        length=signature.check(inputs).get("time"),
        notes=(*warnings, *notes),
        warnings=tuple(warnings),
    )


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
