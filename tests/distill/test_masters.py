from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from thesean.distill.masters import Masters
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


def mixed(half: torch.dtype) -> tuple[list[nn.Parameter], Masters]:
    weights = [nn.Parameter(torch.full((3,), 1.5, dtype=dtype)) for dtype in (half, torch.float32)]
    return weights, Masters(weights)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_gradients_of_several_losses_add_up_in_single_for_masters_and_all_other_weights_themselves(half):
    weights, masters = mixed(half)
    assert [p.dtype for p in masters.parameters] == [torch.float32] * 2
    assert masters.parameters[1] is weights[1]
    for _ in range(2):  # and a second step begins anew
        masters.clear()
        for factor in (0.5, 1e-4):
            masters.backward(torch.stack([(factor * w.float() ** 2).sum() for w in weights]).sum())
        assert masters.finish()
        assert weights[0].grad is None
        for parameter in masters.parameters:
            torch.testing.assert_close(parameter.grad, torch.full((3,), 1.5 + 3e-4), rtol=1e-3, atol=0)


def test_gradients_of_double_weights_keep_their_digits():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    masters = Masters([nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), weight])
    masters.backward((weight * (1 / 3)).sum())
    assert masters.finish()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1 / 3] * 3


def test_weights_become_what_their_masters_round_to():
    weights, masters = mixed(torch.bfloat16)
    for parameter in masters.parameters:
        parameter.data.fill_(1.001)
    masters.write()
    assert weights[0].tolist() == [1.0] * 3
    assert weights[1].tolist() == pytest.approx([1.001] * 3)


def overflows(masters: Masters) -> bool:
    """Whether a step whose gradient has no number is left out."""
    masters.clear()
    masters.backward(masters._weights[0].float().sum() * torch.inf)
    return not masters.finish()


def scale_of(masters: Masters) -> float:
    """What losses are scaled by, as gradients show it before they are divided."""
    masters.clear()
    masters.backward(masters._weights[0].float().sum() / 4)  # float16 could not hold the largest scale
    found = masters.parameters[0].grad
    assert found is not None
    return 4 * float(found[0])


def test_a_float16_loss_is_scaled_by_half_after_an_overflow_and_by_twice_after_a_hundred_good_steps():
    _, masters = mixed(torch.float16)
    first = scale_of(masters)
    assert overflows(masters)
    assert scale_of(masters) == first / 2
    for steps, scale in ((99, first / 2), (1, first), (99, first), (1, 2 * first), (1000, 2.0**16)):
        for _ in range(steps):
            scale_of(masters)
            assert masters.finish()
        assert scale_of(masters) == scale
    _, fresh = mixed(torch.float16)
    for _ in range(99):
        scale_of(fresh)
        assert fresh.finish()
    assert scale_of(fresh) == first
    assert fresh.finish()
    assert scale_of(fresh) == 2 * first
    while overflows(masters):
        assert scale_of(masters) >= 1
    assert scale_of(masters) == 0.5  # a gradient that overflows unscaled is the network's own, and is told


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float32])
def test_no_other_loss_is_scaled_and_none_of_its_steps_is_left_out(half):
    _, masters = mixed(half)
    assert scale_of(masters) == 1
    assert not overflows(masters)


def test_a_checkpoint_holds_weights_and_scale():
    _, masters = mixed(torch.float16)
    for parameter in masters.parameters:
        parameter.data.fill_(1.25 + 2**-14)
    assert overflows(masters)
    for _ in range(60):
        scale_of(masters)
        assert masters.finish()
    again_weights, again = mixed(torch.float16)
    again.load_state_dict(masters.state_dict())
    assert [w.tolist() for w in again_weights] == [[1.25] * 3, [1.25 + 2**-14] * 3]
    assert all(map(torch.equal, again.parameters, masters.parameters))
    for one in (masters, again):
        for _ in range(39):
            scale_of(one)
            assert one.finish()
    assert scale_of(again) == scale_of(masters)
    for one in (masters, again):
        assert one.finish()
    assert scale_of(again) == scale_of(masters) == 2.0**12
