"""The user's batches, checked and read in one way: tensors, tuples (x, y) or dicts, as many times as asked."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from thesean.distill.callbacks import each_of, length_of
from thesean.distill.hold_out import hold_out
from thesean.distill.stream import Stream, check_same
from thesean.distill.task import Batch, InputsOf, LabelsOf
from thesean.errors import DataError
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.inputs import forward_parameters, unwrapped
from thesean.passes.graph.signature import Signature

# What a Hugging Face batch carries for the loss alone; read by the graph only if the example inputs had it.
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label")


class Reading(NamedTuple):
    """What the caller says is what in a batch; None: as it is guessed."""

    inputs: InputsOf | None = None
    labels: LabelsOf | None = None


_GUESSED = Reading()


@dataclass(frozen=True)
class Batches:
    """`data` seen through the guide's signature. Raises DataError for what does not fit, with the batch's number."""

    data: Iterable[Any]
    signature: Signature
    device: torch.device
    reading: Reading = _GUESSED
    name: str = "data"
    start: int = 0  # the number of the first batch, for what is told

    def __post_init__(self) -> None:
        check_readable(self.data, self.name)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
        """Pairs of the batch as it came, or of (batch, labels) where the caller tells these, and the graph's inputs."""
        inputs_of, labels_of = self.reading
        for number, batch in enumerate(each_of(self.data, self.name), self.start):
            place = f"batch {number}" if self.name == "data" else f"{self.name}, batch {number}"
            try:
                inputs = named_inputs(batch if inputs_of is None else inputs_of(batch), self.signature)
                self.signature.check(inputs)
                check_not_empty(inputs)
                told = batch if labels_of is None else (batch, labels_of(batch))
            except DataError as error:
                raise DataError(f"{place}: {error}") from error.__cause__
            for name, value in inputs.items():
                if value.device != self.device:
                    raise DataError(
                        f"{place}: {name!r} is on {value.device}, the guide on {self.device}. Move one of them."
                    )
            # autograd can't save tensors that were made in inference mode
            yield told, {k: v.clone() if v.is_inference() else v for k, v in inputs.items()}

    def first(self, count: int) -> list[tuple[Any, dict[str, torch.Tensor]]]:
        """At most `count` batches of one pass."""
        return list(itertools.islice(self, count))


def check_readable(data: Any, name: str = "data") -> None:
    """Raises DataError unless `data` is an iterable of at least one batch that can be read again."""
    if isinstance(data, Iterator):
        raise DataError(
            f"{name} is an iterator, which can be read only once. Pass a list or a DataLoader, or an object whose "
            "__iter__ starts anew."
        )
    if isinstance(data, torch.Tensor):
        raise DataError(f"{name} is one tensor; expected an iterable of batches. Wrap it: {name}=[x].")
    if not isinstance(data, Iterable):
        mend = (
            f"Call it first: {name}={getattr(data, '__name__', name)}()."
            if callable(data)
            else f"Give it in batches: torch.utils.data.DataLoader({name}, batch_size=8)."
        )
        raise DataError(f"{name} is a {type(data).__name__}; expected an iterable of batches. {mend}")
    if next(each_of(data, name), None) is None:
        raise DataError(f"{name} is empty: expected at least one batch.")


def check_not_empty(inputs: Mapping[str, torch.Tensor]) -> None:
    """Raises DataError for a batch without rows, or of sequences without steps: there is nothing to learn from it."""
    for name, value in inputs.items():
        if not value.numel():
            raise DataError(f"{name!r} is empty, of shape {tuple(value.shape)}. Leave such batches out.")


def named_inputs(batch: Any, signature: Signature) -> dict[str, torch.Tensor]:
    """The graph's inputs in a batch: a dict by name; of a tuple the first few, or those of the first one."""
    names = [s.name for s in signature.inputs]
    batch = by_field(batch, names)
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


def by_field(batch: Any, names: Sequence[str]) -> Any:
    """A dataclass as a dict of its fields, and a named tuple that has fields of all these names, one at least; else the
    batch.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, (type, Mapping)):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    fields = getattr(batch, "_fields", ()) if isinstance(batch, tuple) else ()
    if names and set(names) <= set(fields):
        return dict(zip(fields, batch, strict=True))
    return batch


def example_of(batch: Any, takes: int = 1, needs: int = 1) -> Any:
    """Example inputs in a first batch: a dict without its labels; of ((a, b), y) both; of (x, y) the first; of
    (x, lengths, y) all but the last, as far as the guide's forward, which `takes` so many, has a place for them, and
    the last too where it `needs` that one.
    """
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k not in LABELS and not _is_text(v)}
    if isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], Mapping):
            return example_of(batch[0])
        if isinstance(batch[0], (tuple, list)):
            return tuple(batch[0])
        return tuple(batch[: max(1, min(needs, len(batch)), min(takes, len(batch) - 1))])
    return batch


def _is_text(value: Any) -> bool:
    """What some data carry along, and no graph reads."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(v, str) for v in value))


def labels_in(batch: Any, inputs: int = 1) -> list[torch.Tensor]:
    """The tensors of a batch that may be labels, the likeliest first: those under a label key of a dict, or those of a
    tuple after its `inputs`, from the end.
    """
    batch = _labelled(batch)
    if isinstance(batch, Mapping):
        found = [batch[k] for k in LABELS if k in batch]
    elif isinstance(batch, (tuple, list)):
        nested = batch and isinstance(batch[0], (Mapping, tuple, list))
        found = pytree.tree_leaves(list(batch[: (0 if nested else max(inputs, 1) - 1) : -1]))
    else:
        found = []
    return [y for y in found if isinstance(y, torch.Tensor)]


def _labelled(batch: Any) -> Any:
    """A dataclass by its fields, and a named tuple that has one for labels; else the batch."""
    return by_field(batch, [k for k in LABELS if k in getattr(batch, "_fields", ())])


def synthetic(signature: Signature, sizes: dict[str, int], device: torch.device, batches: int, seed: int) -> list[Any]:
    """Random inputs of the guide's shapes, as dicts."""
    return [
        signature.random_inputs(sizes, seed=seed * 1000 + i, device=str(device), fresh=True) for i in range(batches)
    ]


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
    example_labels: tuple[torch.Tensor, ...] = ()  # what may be labels in the first batch, the likeliest first
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def stream(self) -> Stream:
        """Pass after pass; one place in the data for all phases of a run."""
        return Stream(self.batches)

    def take(self, count: int) -> list[Batch]:
        """At most `count` batches of one pass, from its start."""
        taken = list(itertools.islice(self.batches, count))
        for batch in taken[:1]:
            check_same(batch)
        return taken


def example_inputs_of(
    model: nn.Module, data: Iterable[Any] | None, example_inputs: Any, inputs: InputsOf | None = None
) -> Any:
    """What the guide is traced with: as given, else the first batch's inputs, else its own `dummy_inputs`."""
    if example_inputs is not None:
        return example_inputs
    if data is not None:
        check_readable(data)
        if inputs is not None:
            return inputs(next(each_of(data, "data")))
        # what is no module is refused by the capture
        places = forward_parameters(unwrapped(model)) if isinstance(model, nn.Module) else {}
        takes = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in places.values())
        needed = [
            n for n, p in places.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        first = by_field(next(each_of(data, "data")), needed)
        found = example_of(first, takes, len(needed))
        _check_shifted(model, first, found, places)
        return _taken(found, places, needed) if isinstance(found, Mapping) else found
    return getattr(model, "dummy_inputs", None)


_SHIFTED, _SHIFTING = "decoder_input_ids", "prepare_decoder_input_ids_from_labels"  # transformers' own words


def _check_shifted(model: Any, batch: Any, found: Any, places: Mapping[str, Any]) -> None:
    """Raises DataError for a batch for training, of whose labels of steps the model makes its decoder's inputs."""
    if not isinstance(found, Mapping) or _SHIFTED not in places or any(name.startswith("decoder_") for name in found):
        return
    label = next((name for name in LABELS if isinstance(batch, Mapping) and name in batch), None)
    if label is None or getattr(batch[label], "ndim", 0) != 2 or not callable(getattr(model, _SHIFTING, None)):
        return
    own = ", ".join(f"{name!r}: batch[{name!r}]" for name in found if name in places)
    raise DataError(
        f"the guide takes {_SHIFTED}, which it makes of {label} where it trains. Say so: inputs=lambda batch: {{{own}, "
        f"{_SHIFTED!r}: model.{_SHIFTING}(batch[{label!r}])}}"
    )


def _taken(found: Mapping[str, Any], places: Mapping[str, inspect.Parameter], needed: Iterable[str]) -> Any:
    """Of the columns of a batch those that forward has a place for, where it has one for all that it needs."""
    if any(p.kind is p.VAR_KEYWORD for p in places.values()) or not set(needed) <= set(found):
        return found
    return {name: value for name, value in found.items() if name in places and value is not None} or found


def make_feed(
    captured: Captured,
    data: Iterable[Any] | None,
    eval_data: Iterable[Any] | None,
    example_inputs: Any,
    seed: int,
    reading: Reading = _GUESSED,
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
    check_readable(data)
    held_source = eval_data
    if held_source is None:
        data, held_source, told = hold_out(data, seed)
        if not warnings:
            notes.append(told)
    if warnings:
        reading = _GUESSED  # random inputs are no batches of the caller's
    batches = Batches(data, signature, device, reading)
    if held_source is None:
        held_out = batches.first(_STAGE_BATCHES)
    else:
        name = "data" if eval_data is None else "eval_data"
        start = length_of(data) or 0 if eval_data is None else 0
        held_out, more = _all_of(Batches(held_source, signature, device, reading, name, start))
        if more:
            warnings.append(f"eval_data has no len() and did not end: measured on its first {len(held_out)} batches")
    first, read = batches.first(1)[0]
    labels = labels_in(first, 1 if reading.labels else len(signature.inputs))
    if reading == _GUESSED and not warnings:
        notes += _told(first, list(read))
    return Feed(
        batches=batches,
        held_out=held_out,
        first=first,
        length=signature.check(read).get("time"),
        example_labels=tuple(labels),
        notes=(*warnings, *notes),
        warnings=tuple(warnings),
    )


def _told(first: Any, read: Sequence[str]) -> list[str]:
    """What of a batch was taken for what."""
    fields = _labelled(first)
    if isinstance(fields, Mapping):
        key = next((k for k in LABELS if k in fields), "none")
        others = [str(k) for k in fields if k not in read and k not in LABELS]
        told = [f"inputs: {', '.join(read)}; labels: {key}. inputs= and labels= say otherwise"]
        return [*told, f"of each batch no input: {', '.join(others)}"] if others else told
    if isinstance(first, (tuple, list)) and len(first) > 1:
        which = "the last" if len(first) == 2 else f"the last that fits, of {len(first)}"
        which = "none" if len(read) == len(first) else which
        return [f"inputs: {', '.join(read)}; labels: {which}. inputs= and labels= say otherwise"]
    return []


_MOST_HELD, _MOST_HELD_BYTES = 1024, 2**31


def _all_of(batches: Batches) -> tuple[list[Batch], bool]:
    """The batches, and whether there are more: of what tells no length, which may have no end, as many as fit."""
    if length_of(batches.data) is not None:
        return list(batches), False
    found: list[Batch] = []
    size = 0
    for batch in batches:
        if len(found) == _MOST_HELD or size > _MOST_HELD_BYTES:
            return found, True
        found.append(batch)
        size += sum(v.nbytes for v in batch[1].values())
    return found, False


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
