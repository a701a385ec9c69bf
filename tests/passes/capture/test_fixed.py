"""Lengths that a graph has fixed at the example's, though the guide runs at others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.fixed import fixed_lengths


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def fixed_at(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Captured:
    """Captured with nothing free but the batch."""
    x = torch.ones(shape).to(dtype)
    found = capture(Scaled(), {"x": x})
    (spec,) = found.signature.inputs
    signature = replace(found.signature, inputs=(replace(spec, shape=("batch", *shape[1:])),))
    return replace(found, signature=signature)


def takes_any(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return 2 * inputs["x"]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)])
def test_each_dimension_of_a_signal_or_a_sequence_that_could_be_longer_is_told(shape):
    notes = fixed_lengths(fixed_at(shape), takes_any)
    assert [note.split(",")[0] for note in notes] == [
        f"x: dimension {dim} is fixed at {size}" for dim, size in enumerate(shape) if dim
    ]
    assert "dynamic={'x': {0: 'batch', 1: 'time'}} leaves it free" in notes[0]
    assert fixed_lengths(fixed_at(shape), takes_any, told=[("x", dim) for dim in range(1, len(shape))]) == ()


def test_images_and_tables_of_whole_numbers_are_left_alone():
    assert fixed_lengths(fixed_at((2, 3, 4, 4)), takes_any) == ()
    assert fixed_lengths(fixed_at((2, 3, 4), torch.int64), takes_any) == ()
    assert len(fixed_lengths(fixed_at((2, 3), torch.int64), takes_any)) == 1


def test_a_guide_that_takes_no_other_length_has_none_fixed():
    found = fixed_at((4, 6))

    def refuses(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if inputs["x"].shape[1] != 6:
            raise ValueError("six")
        return inputs["x"]

    assert fixed_lengths(found, refuses) == ()
