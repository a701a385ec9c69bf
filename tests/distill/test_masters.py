from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from thesean.distill.train import Trainer
from thesean.report import NullObserver


def trained(dtype: torch.dtype, steps: int = 40, size: float = 1e-4, scale: float = 1.0, **settings) -> torch.Tensor:
    """Weights of 1 after so many steps of this size towards 0."""
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    Trainer(observer=NullObserver(), warmup=1, **settings).train(
        [p],
        lambda step, batch: (p * scale).sum(),
        itertools.repeat(None),
        steps=steps,
        learning_rate=size,
        where="here",
    )
    assert p.dtype == dtype
    return p.detach().double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_half_precision_are_added_up(dtype):
    wanted = trained(torch.float32, steps=200)
    moved = trained(dtype, steps=200)  # each step is an eighth of what float16 can hold beside 1, or less
    assert (moved < 1).all()
    assert (moved - wanted).abs().max() <= torch.finfo(dtype).eps


def test_gradients_that_float16_can_not_hold_still_train():
    assert (trained(torch.float16, size=1e-2, scale=2e-8) < 0.9).all()


def test_a_step_that_overflows_is_left_out_and_the_next_ones_are_smaller():
    assert (trained(torch.float16, size=1e-2, scale=200.0) < 0.9).all()


def test_autocast_computes_steps_in_bfloat16_and_keeps_weights_in_float32():
    seen: list[torch.dtype] = []
    p = nn.Parameter(torch.ones(4, 4))

    def loss(step: int, batch: None) -> torch.Tensor:
        y = p @ p
        seen.append(y.dtype)
        return y.float().sum()

    Trainer(observer=NullObserver(), precision="bfloat16").train(
        [p], loss, itertools.repeat(None), steps=2, learning_rate=0.1, where="here"
    )
    assert seen == [torch.bfloat16] * 2
    assert p.dtype == torch.float32
