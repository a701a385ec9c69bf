"""How far a result may be from the float64 reference, per dtype. The same on every machine: widen a bound here for
all tests, with a reason, or not at all."""

from __future__ import annotations

import torch

# relative to the reference's norm, for sums of some thousand terms
VALUE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """|actual - expected| / |expected|, in float64. NaN where either holds one, which no bound lets pass. Takes `.grad`
    as it is, and fails where there is none."""
    assert actual is not None
    assert expected is not None
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


# Triton's kernels against the float64 reference on the same, already rounded inputs
KERNEL_VALUE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KERNEL_GRADIENT = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 1e-2}
