"""Which dimensions of the inputs are free, and what they are called: "batch", and "time" for a sequence."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from thesean.errors import DataError
from thesean.passes.analyse.float_masks import hides_by_adding
from thesean.passes.graph.resample import is_mask

Dynamic = Mapping[str, Mapping[int, str]]


def guess_dynamic(inputs: Mapping[str, torch.Tensor], sequence: bool) -> dict[str, dict[int, str]]:
    """The batch is the first dimension, or the second of an input whose first one is another size, as a state of shape
    (layers, batch, width) has it. The second dimension of (B, T) integers and (B, T, D) floats may be a `sequence`, and
    that of floats of just such a (B, T), which are a mask. One of pairs of steps, (..., T, T) or (..., 1, T), ends in
    such sequences.
    """
    sizes = [v.shape[0] for v in inputs.values() if v.ndim]
    batch = sizes[0] if sizes else 0
    steps = {v.shape[:2] for v in inputs.values() if _looks_like_sequence(v) and v.shape[0] == batch}
    lengths = {length for _, length in steps}
    free = {}
    for name, value in inputs.items():
        if value.shape not in steps and _is_of_pairs(value, lengths):
            free[name] = _pairs(value, batch, sequence)
        else:
            free[name] = _guess(value, batch, sequence and (_looks_like_sequence(value) or value.shape in steps))
    return free


def _is_of_pairs(value: torch.Tensor, lengths: Collection[int]) -> bool:
    """A mask that says which steps may meet: ones and zeros, or zeros and what hides."""
    if value.ndim < 2 or value.shape[-1] not in lengths or value.shape[-2] not in (value.shape[-1], 1):
        return False
    if value.shape[-2] == 1 and value.ndim != 4:
        return False
    return is_mask(value) or hides_by_adding(value)


def _pairs(value: torch.Tensor, batch: int, sequence: bool) -> dict[int, str]:
    free = {0: "batch"} if value.ndim > 2 and value.shape[0] == batch else {}
    steps = [at for at in (value.ndim - 2, value.ndim - 1) if value.shape[at] != 1]
    return free | dict.fromkeys(steps if sequence else [], "time")


def _looks_like_sequence(value: torch.Tensor) -> bool:
    return value.ndim == 3 if value.is_floating_point() else value.ndim == 2


def _guess(value: torch.Tensor, batch: int, sequence: bool) -> dict[int, str]:
    if value.ndim == 0:
        return {}
    if value.ndim > 2 and value.shape[0] != batch == value.shape[1]:
        return {1: "batch"}
    free = {0: "batch"} if value.shape[0] == batch or value.shape[0] != 1 else {}  # one row for a whole batch
    return free | ({1: "time"} if sequence else {})


def check_dynamic(dynamic: Dynamic, inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[int, str]]:
    """The caller's own, complete: what it leaves out is fixed. Raises DataError for what the inputs don't have."""
    for name, dims in dynamic.items():
        if name not in inputs:
            raise DataError(f"dynamic: the guide has no input {name!r}; it has: {', '.join(inputs)}.")
        for dim, label in dims.items():
            if not isinstance(dim, int) or not 0 <= dim < inputs[name].ndim:
                raise DataError(
                    f"dynamic: {name!r} has dimensions 0 to {inputs[name].ndim - 1} (shape "
                    f"{tuple(inputs[name].shape)}), found {dim!r}."
                )
            if not isinstance(label, str) or not label.isidentifier():
                raise DataError(
                    f'dynamic: expected a name such as "batch" or "time" for {name}[{dim}], found {label!r}.'
                )
    return {name: dict(dynamic.get(name, {})) for name in inputs}


def at_least_two(value: torch.Tensor, dims: Mapping[int, str]) -> torch.Tensor:
    """Sizes 0 and 1 specialise at export, so a batch (and a sequence) of one is doubled."""
    times = [2 if dim in dims and size == 1 else 1 for dim, size in enumerate(value.shape)]
    return value.repeat(times) if max(times, default=1) > 1 else value
