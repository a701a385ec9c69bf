"""S steps, H heads, C width of a head"""

from __future__ import annotations

import json
import math

import pytest
import torch

from thesean.targets.shared.rotation import Rotate, Rotation

# features 0 and 3 are a pair, 2 and 1 another, 4 is left alone
ROTATION = Rotation((0, 2), (3, 1), (0.7, 0.01))


def turned(x_BSHC: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """The definition, pair by pair, in double."""
    out = x_BSHC.double().clone()
    for at, step in enumerate(steps):
        for a, b, angle in zip(*ROTATION, strict=True):
            first, second = x_BSHC[:, at, :, a].double(), x_BSHC[:, at, :, b].double()
            cos, sin = math.cos(step * angle), math.sin(step * angle)
            out[:, at, :, a], out[:, at, :, b] = cos * first - sin * second, cos * second + sin * first
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_pair_is_turned_by_its_step_times_its_angle(dtype):
    x_BSHC, rotate = torch.randn(2, 6, 3, 5, dtype=dtype), Rotate(ROTATION, 5)
    found = rotate(x_BSHC)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), turned(x_BSHC, list(range(6))), rtol=1e-5, atol=1e-6)
    later = rotate.turn(x_BSHC, rotate.tables(10, x_BSHC), 4)
    torch.testing.assert_close(later.double(), turned(x_BSHC, list(range(4, 10))), rtol=1e-5, atol=1e-6)


def test_far_steps_are_turned_as_exactly_as_near_ones_in_half_precision_networks_too():
    steps = [0, 4095, 8192, 100_001]
    for rotate in (Rotate(ROTATION, 5), Rotate(ROTATION, 5).half()):
        x_BSHC = torch.randn(1, 4, 1, 5)
        tables = rotate.tables_at(torch.tensor(steps), x_BSHC)
        found = rotate.turn_by(x_BSHC, *tables)
        torch.testing.assert_close(found.double(), turned(x_BSHC, steps), rtol=0, atol=3e-5)
        assert rotate.turn_by(x_BSHC.half(), *tables).dtype == torch.float16


def test_rows_may_be_at_steps_of_their_own():
    x_BSHC, rotate, step_BS = torch.randn(2, 3, 1, 5), Rotate(ROTATION, 5), torch.tensor([[0, 1, 2], [7, 8, 9]])
    found = rotate.turn_by(x_BSHC, *rotate.tables_at(step_BS, x_BSHC))
    for row, steps in enumerate(step_BS.tolist()):
        torch.testing.assert_close(
            found[row : row + 1].double(), turned(x_BSHC[row : row + 1], steps), rtol=1e-5, atol=1e-6
        )


def test_a_rotation_is_saved_as_numbers_and_its_tables_not_at_all():
    assert Rotation.of(json.loads(json.dumps(ROTATION.rows()))) == ROTATION
    assert not Rotate(ROTATION, 5).state_dict()
    outline = Rotate(ROTATION, 5).to("meta")
    assert outline.partner_C.is_meta
