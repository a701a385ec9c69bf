"""Which batch the guide itself does not run on: looked for once something has failed, so that it costs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from thesean.distill.data import Batches, Reading
from thesean.errors import DataError
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.explain import short

_MOST = 10_000  # batches: data may have no end


@contextmanager
def naming_misfits(captured: Captured, sources: Mapping[str, Any], reading: Reading) -> Iterator[None]:
    """torch's errors inside become a DataError that names the batch, where it is the guide that doesn't run on one."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        told = next(_misfits(captured, sources, reading), None)
        if told is None:
            raise
        raise DataError(told) from error


@torch.no_grad()
def _misfits(captured: Captured, sources: Mapping[str, Any], reading: Reading) -> Iterator[str]:
    device = next(iter(captured.example.values())).device
    for name, data in sources.items():
        if data is None:
            continue
        batches = Batches(data, captured.signature, device, reading)
        for number, (_, inputs) in enumerate(islice(batches, _MOST)):
            try:
                captured.graph_module(**inputs)
            except (IndexError, RuntimeError) as error:
                why = captured.signature.out_of_range(inputs) or f"{_sizes(captured, inputs)}: {short(error)}"
                yield f"{name}, batch {number}: the guide does not run on it: {why}."


def _sizes(captured: Captured, inputs: dict[str, torch.Tensor]) -> str:
    """What differs from the example, on which it ran."""
    now, before = captured.signature.check(inputs), captured.signature.check(captured.example)
    return ", ".join(f"{k} {v}, where the example has {before[k]}" for k, v in now.items() if v != before[k]) or "torch"
