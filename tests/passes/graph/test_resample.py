"""Inputs of other sizes are like the example: in range, in order, of the same rows.

B batch, T time, D width
"""

from __future__ import annotations

import pytest
import torch

from thesean.passes.graph.resample import resampled
from thesean.passes.graph.signature import InputSpec, Signature


def made(example: torch.Tensor, shape, fresh: bool = False, high: int | None = None, seed: int = 0, **sizes: int):
    before = {d: s for d, s in zip(shape, example.shape, strict=True) if isinstance(d, str)}
    generator = torch.Generator().manual_seed(seed)
    return resampled(example, shape, sizes, before, generator, high=high, fresh=fresh)


def rows(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in x.flatten(0, -2)}


def test_tokens_of_floats_are_the_examples_in_another_order():
    x_BTD = torch.randn(4, 6, 3)
    y_BTD = made(x_BTD, ("batch", "time", 3), batch=5, time=11)
    assert y_BTD.shape == (5, 11, 3)
    assert rows(y_BTD) == rows(x_BTD)
    assert not torch.equal(made(x_BTD, ("batch", "time", 3), batch=4, time=6), x_BTD)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_fresh_floats_stay_in_the_examples_range_and_repeat_nothing(count):
    x_BD = torch.rand(count, 5) + 0.1
    y_BD = made(x_BD, ("batch", 5), fresh=True, batch=30)
    assert y_BD.min() >= x_BD.min()
    assert y_BD.max() <= x_BD.max()
    assert torch.linalg.matrix_rank(y_BD - y_BD.mean(0)) == 5


def test_features_that_count_are_only_picked():
    x_BD = torch.eye(4)[torch.tensor([0, 1, 2, 3, 3])]
    assert rows(made(x_BD, ("batch", 4), fresh=True, batch=9)) == rows(x_BD)


def test_of_a_constant_only_the_sign_is_known():
    assert made(torch.full((2, 4), 3.0), ("batch", 4), batch=50).min() > 0
    assert made(torch.full((2, 4), -3.0), ("batch", 4), batch=50).max() < 0
    zeros = made(torch.zeros(2, 4), ("batch", 4), batch=50)
    assert zeros.min() < 0 < zeros.max()


def test_ids_stay_between_the_examples_and_columns_of_their_own_stay_columns():
    ids_BT = torch.randint(5, 9, (4, 12))
    assert set(made(ids_BT, ("batch", "time"), high=50, batch=9, time=30).unique().tolist()) == {5, 6, 7, 8}
    assert made(torch.zeros(1, 4, dtype=torch.long), ("batch", "time"), high=9, batch=9, time=30).max() > 0
    columns_BD = torch.stack([torch.arange(8) % 2, 10 + torch.arange(8) % 3], 1)
    assert rows(made(columns_BD, ("batch", 2), high=20, batch=30)) <= rows(columns_BD)


def test_offsets_and_positions_rise():
    offsets = torch.arange(0, 24, 3)
    signature = Signature(
        inputs=(
            InputSpec(name="text", dtype=torch.int64, shape=("batch",), example=torch.randint(0, 50, (24,))),
            InputSpec(name="offsets", dtype=torch.int64, shape=("batch_1",), example=offsets),
        )
    )
    for words, bags in ((24, 8), (24, 11), (2, 2), (1, 1), (5, 3)):
        found = signature.random_inputs({"batch": words, "batch_1": bags})["offsets"]
        assert len(found) == bags
        assert found[0] == 0
        assert (found.diff() >= 0).all()
        assert found.max() <= words
    positions_BT = torch.arange(6).repeat(3, 1)
    assert made(positions_BT, ("batch", "time"), high=9, batch=1, time=11).tolist() == [[*range(9), 8, 8]]


def test_rows_of_times_come_again_in_turn_and_each_goes_on_by_its_own_step():
    times_BT = torch.tensor([[1.0], [2.0], [3.0]]) * torch.arange(4)
    longer_BT = torch.tensor([[1.0], [2.0], [3.0], [1.0], [2.0]]) * torch.arange(6)
    assert torch.equal(made(times_BT, ("batch", "time"), batch=5, time=6), longer_BT)
    assert torch.equal(made(times_BT, ("batch", "time"), batch=2, time=3), times_BT[:2, :3])


def test_lengths_shrink_with_what_they_count():
    specs = (
        InputSpec(name="x", dtype=torch.float32, shape=("batch", "time", 3), example=torch.randn(4, 12, 3)),
        InputSpec(name="n", dtype=torch.int64, shape=("batch",), example=torch.tensor([12, 1, 5, 7])),
        InputSpec(name="last", dtype=torch.int64, shape=("batch",), example=torch.tensor([11, 0, 4, 6])),
    )
    for time in (1, 3, 30):
        found = Signature(inputs=specs).random_inputs({"batch": 8, "time": time})
        assert 1 <= found["n"].min() <= found["n"].max() <= time
        assert 0 <= found["last"].min() <= found["last"].max() < time


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_hides_nothing_however_much_was_padded(visible, side):
    lengths = torch.tensor([2, 9, 3, 2])
    steps = torch.arange(9) if side == "right" else torch.arange(9).flip(0)
    mask_BT = (steps < lengths[:, None]) == visible
    assert torch.equal(made(mask_BT, ("batch", "time"), batch=2, time=5), torch.full((2, 5), visible))
    assert made((steps < lengths[:, None]).long(), ("batch", "time"), batch=2, time=5).min() == 1


def test_rows_of_one_token_say_at_which_end_all_are_visible():
    mask_BT = torch.zeros(4, 4, dtype=torch.bool)
    mask_BT[:, -1] = mask_BT[3] = True  # fewer than half of all
    assert made(mask_BT, ("batch", "time"), batch=2, time=5).all()
    assert not made(~mask_BT, ("batch", "time"), batch=2, time=5).any()
    assert made(mask_BT.flip(1), ("batch", "time"), batch=2, time=5).all()


def test_a_state_whose_batch_is_the_second_dimension_keeps_its_layers():
    h_LBD = torch.stack([torch.rand(20, 3), 5 + torch.rand(20, 3)])
    found = made(h_LBD, (2, "batch", 3), batch=7)
    assert found.shape == (2, 7, 3)
    assert found[0].max() < 1 < found[1].min()


@pytest.mark.parametrize("time", [1, 4, 6, 11])
@pytest.mark.parametrize("shape", [("time", "time"), ("batch", 1, "time", "time")])
def test_a_mask_of_pairs_looks_back_at_any_length_as_the_example_does(shape, time):
    def causal(steps: int, rows: int) -> torch.Tensor:
        mask_TT = torch.full((steps, steps), -torch.inf).triu(1)
        return mask_TT if len(shape) == 2 else mask_TT.expand(rows, 1, steps, steps)

    spec = InputSpec(name="x", dtype=torch.float32, shape=shape, mask=True, example=causal(6, 4))
    found = Signature(inputs=(spec,)).random_inputs({"batch": 3, "time": time})["x"]
    assert torch.equal(found, causal(time, 3))
