"""Lengths that the graph has fixed at the example's, though the guide runs at others: told in a line each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from thesean.passes.capture.captured import Captured
from thesean.passes.capture.convention import tensors
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.graph.signature import InputSpec


@torch.no_grad()
def fixed_lengths(
    captured: Captured, guide: Callable[[dict[str, torch.Tensor]], Any], told: Collection[tuple[str, int]] = ()
) -> tuple[str, ...]:
    """A note for each dimension of a signal or a sequence that the guide runs with twice over, and the graph can't.

    Images have their sizes, and are left alone; so are the dimensions, by input and place, that were `told` already.
    """
    signature = captured.signature
    sizes = probe_sizes(captured)
    notes = []
    for spec in signature.inputs:
        sequence = (2, 3) if spec.dtype.is_floating_point else (2,)
        for dim in range(1, len(spec.shape)) if len(spec.shape) in sequence else ():
            known = isinstance(spec.shape[dim], str) or (spec.name, dim) in told
            if known or not _runs_longer(captured, guide, sizes, spec, dim):
                continue
            free = {k: d.split("_")[0] for k, d in enumerate(spec.shape) if isinstance(d, str)}
            notes.append(
                f"{spec.name}: dimension {dim} is fixed at {spec.shape[dim]}, the example's, though the guide runs at "
                f"others: it is not where a length is looked for, or the code computes with it as a plain number. "
                f"dynamic={ {spec.name: dict(sorted({**free, dim: 'time'}.items()))} } leaves it free."
            )
    return tuple(notes)


def _runs_longer(
    captured: Captured,
    guide: Callable[[dict[str, torch.Tensor]], Any],
    sizes: dict[str, int],
    spec: InputSpec,
    dim: int,
) -> bool:
    """Whether the guide takes twice as much there; of inputs that share the size, each is doubled."""
    device = str(next(iter(captured.example.values())).device)
    inputs = captured.signature.random_inputs(sizes, device=device)
    size = spec.shape[dim]
    for other in captured.signature.inputs:
        if len(other.shape) > dim and other.shape[dim] == size:
            inputs[other.name] = torch.cat([inputs[other.name]] * 2, dim)
    try:
        return bool(tensors(guide(inputs)))
    except Exception:  # whatever it says: this size is the guide's own
        return False
