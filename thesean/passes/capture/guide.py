"""The guide as it is run for a capture: from what it kept before the first call, each time, and told where it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from thesean.errors import CaptureError, DataError
from thesean.passes.capture.convention import same_outputs, tensors, void
from thesean.passes.capture.dynamic import Dynamic, at_least_two, guess_dynamic
from thesean.passes.capture.explain import returned, short, where_of
from thesean.passes.capture.inputs import SAY_INPUTS, forward_parameters
from thesean.passes.capture.stand_in import foreign
from thesean.passes.graph.attributes import KeptAttributes
from thesean.passes.graph.modes import KeptBuffers, configured, evaluating

# Serving flags of Hugging Face's forward: a key-value cache has no place in a converted model.
SWITCHED_OFF = ("use_cache",)


class Guide:
    """`model` in eval mode: called with inputs by name, which it may write into. What a call leaves behind in Python is
    gone after it; buffers are as they were when `running` ends. `notes` are what a person should know of it.
    """

    def __init__(self, model: nn.Module, constants: dict[str, Any], buffers: KeptBuffers) -> None:
        self.model, self.constants, self.buffers = model, constants, buffers
        self.attributes = KeptAttributes(model)
        self.notes: tuple[str, ...] = ()

    def __call__(self, inputs: dict[str, torch.Tensor]) -> Any:
        with self.forgetting():
            return self.model(**own_copies(inputs), **self.constants)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What the model's code keeps in attributes inside is gone afterwards."""
        try:
            yield
        finally:
            self.attributes.restore()

    def afresh(self, inputs: dict[str, torch.Tensor]) -> Any:
        """One call from buffers that no earlier one wrote."""
        self.buffers.restore()
        return self(inputs)

    def first_run(
        self, given: dict[str, torch.Tensor], free: Dynamic, guessed: bool
    ) -> tuple[dict[str, torch.Tensor], Any, Dynamic]:
        """The inputs to trace with, the guide's output on them, and what is free. What was guessed to be a sequence of
        one step may be the one channel of a signal, and one row be all that the guide takes: neither can be doubled
        then.
        """
        tries = [free]
        if guessed:
            one_row = {k: {d: n for d, n in dims.items() if (k, d) not in _batches(free)} for k, dims in free.items()}
            tries += [guess_dynamic(given, sequence=False), one_row, {k: {} for k in free}]
        failure: DataError | None = None
        tried: list[dict[str, torch.Size]] = []
        for attempt in tries:
            inputs = {k: at_least_two(v.clone(), attempt[k]) for k, v in given.items()}
            shapes = {k: v.shape for k, v in inputs.items()}
            if shapes in tried:
                continue
            tried.append(shapes)
            try:
                output = self.run(inputs)
            except DataError as error:
                failure = failure or error
                continue
            if failure is not None and not _batches(attempt):
                self.notes += ("the guide takes one row at a time, and so does what it is converted to",)
            return inputs, output, attempt
        assert failure is not None
        raise failure

    def run(self, inputs: dict[str, torch.Tensor]) -> Any:
        """The guide's output. Raises CaptureError where it depends on the calls before, through buffers that it writes;
        what it keeps in Python is a note.
        """
        with self.forgetting():
            try:
                eager = self.model(**own_copies(inputs), **self.constants)
            except Exception as error:
                raise DataError(
                    f"the guide does not run on the example inputs{where_of(error)}: {short(error)}."
                    f"{self._places(inputs)}"
                ) from error
            if void(eager):
                raise DataError(
                    "the guide's outputs on the example inputs hold no finite number: nothing can be compared with "
                    "them. Check the weights, and give data= or example_inputs= that the guide was trained for."
                )
            if not tensors(eager):
                raise DataError(f"the guide returns {_kind(eager)}: no tensor is in it. Have it return one.")
            if name := foreign(eager):
                raise CaptureError(returned(name))
            if self.buffers.changed() or self.attributes.changed():
                self._run_again(inputs, eager)
        return eager

    def _places(self, inputs: dict[str, torch.Tensor]) -> str:
        """What was given to it, and what it takes besides: a guess at a batch may be wrong."""
        others = [n for n in forward_parameters(self.model) if n not in inputs and n not in self.constants]
        more = f", and takes {', '.join(others[:8])} too" if others else ""
        return f" It was given {', '.join(inputs)}{more}. {SAY_INPUTS}"

    def _run_again(self, inputs: dict[str, torch.Tensor], eager: Any) -> None:
        """What is another after a second call with the same inputs is a memory of calls; what isn't is made of them."""
        changed = self.buffers.changed()
        once = KeptAttributes(self.model)
        again = self.model(**own_copies(inputs), **self.constants)
        self.buffers.restore()
        same, kept = same_outputs(eager, again), once.changed()
        if changed and not same and not kept:
            raise CaptureError(
                f"the guide keeps a state from call to call in its buffers {_listed(changed)}: the same input gave two "
                "outputs. A graph has no memory: start every sequence inside forward (zeros), and let the converted "
                "network carry the state."
            )
        if kept:
            told = "the same input gave two outputs" if not same else "which outputs of later calls may depend on"
            note = (
                f"the guide keeps {_listed(kept)} from call to call, {told}: a graph has no memory, and computes what "
                "the guide's next call would."
            )
            self.notes = (note,)


def _batches(free: Dynamic) -> list[tuple[str, int]]:
    """Inputs and dimensions that are free for a batch."""
    return [(name, d) for name, dims in free.items() for d, what in dims.items() if what.startswith("batch")]


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def own_copies(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For a forward that may write into what it is given: the caller's tensors are not ours to change."""
    return {name: value.clone() for name, value in inputs.items()}


@contextmanager
def running(model: nn.Module, constants: dict[str, Any]) -> Iterator[Guide]:
    """`model` in eval mode and without a cache; flags, settings, buffers and attributes are the caller's afterwards."""
    with evaluating(model) as buffers, configured(model, dict.fromkeys(SWITCHED_OFF, False)):
        guide = Guide(model, constants, buffers)
        with guide.forgetting():
            yield guide
