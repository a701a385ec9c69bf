"""What a converted network carries from one call to the next, in the form that `generate` hands round.

B batch, P steps that are remembered
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from thesean.errors import DataError
from thesean.passes.graph.signature import InputSpec
from thesean.passes.thread_state import PAST

Tensors = dict[str, torch.Tensor]


class StateRows:
    """Rows of states, taken and joined, by what `specs` declares of each."""

    def __init__(self, specs: Sequence[InputSpec]) -> None:
        self.specs = {spec.name: spec for spec in specs}
        # of each state that remembers steps: in which dimension
        self.past = {
            spec.name: dim
            for spec in specs
            for dim, size in enumerate(spec.shape)
            if isinstance(size, str) and size.startswith(PAST)
        }
        sizes = {spec.shape[self.past[spec.name]] for spec in specs if spec.name in self.past}
        told = {spec.shape[1] for spec in specs if spec.name in self.past and spec.dtype == torch.bool}
        # a row with a shorter past gets steps in front, of which a state of booleans says that they hold no token
        self.joins = sizes == told and all(isinstance(spec.shape[0], str) for spec in specs)

    def take(self, states: Tensors, rows: torch.Tensor) -> Tensors:
        """Rows by their numbers; what all rows count together stays."""
        by_row = {name for name, spec in self.specs.items() if isinstance(spec.shape[0], str)}
        return {n: v.index_select(0, rows.to(v.device)) if n in by_row else v for n, v in states.items()}

    def join(self, states: Sequence[Tensors]) -> Tensors:
        """The rows of all, in order."""
        joined = {}
        for name in self.specs:
            values = [state[name] for state in states]
            if name in self.past:
                dim = self.past[name]
                longest = max(value.shape[dim] for value in values)
                values = [_filled(value, dim, longest) for value in values]
            joined[name] = torch.cat(values)
        return joined


def _filled(value: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Zeros in front."""
    shape = list(value.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([value.new_zeros(shape), value], dim) if shape[dim] else value


class CarriedStates(Cache):
    """Recurrent states, and the keys and values of attentions that were kept. `steps` columns were read, padding among
    them; `tokens_B` of them were tokens.
    """

    def __init__(self, rows: StateRows) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.states: Tensors | None = None
        self.steps = 0
        self.tokens_B: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.steps

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no end

    @property
    def is_initialized(self) -> bool:
        return self.states is not None

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Each row becomes that of a beam."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tokens_B is not None:
            rows = torch.arange(len(self.tokens_B), device=self.tokens_B.device)
            self._take(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Raises DataError: a recurrence doesn't know what it was before its last tokens."""
        raise DataError("a recurrent state can't be shortened: decode without an assistant or look-ahead.")

    def reset(self) -> None:
        self.states, self.steps, self.tokens_B = None, 0, None

    def __repr__(self) -> str:
        return f"CarriedStates(steps={self.steps}, tensors={0 if self.states is None else len(self.states)})"

    def _take(self, rows: torch.Tensor) -> None:
        if self.states is not None:
            self.states = self.rows.take(self.states, rows)
        if self.tokens_B is not None:
            self.tokens_B = self.tokens_B.index_select(0, rows.to(self.tokens_B.device))


def carried(given: Any, rows: StateRows) -> CarriedStates:
    """The caller's, or a sequence's start. Raises DataError for the cache of another kind of model."""
    if given is None:
        return CarriedStates(rows)
    if not isinstance(given, CarriedStates) or given.rows.specs != rows.specs:
        raise DataError(
            f"past_key_values: expected what this network's forward(use_cache=True) gave, found {type(given).__name__}."
        )
    return given
