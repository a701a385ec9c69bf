"""Sequences that end as they begin."""

from __future__ import annotations

import torch

from tests.models import vectors
from thesean.distill.repeating import repeating
from thesean.passes.graph.signature import InputSpec, Signature

IDS = InputSpec(name="ids", dtype=torch.int64, shape=("batch", "time"))
COUNTED = InputSpec(name="positions", dtype=torch.int64, shape=("batch", "time"))
PAIRS = InputSpec(name="pairs", dtype=torch.bool, shape=("batch", 1, "time", "time"))
FRAMES = InputSpec(name="frames", dtype=torch.float32, shape=("batch", 3, "time"))
IMAGE = InputSpec(name="image", dtype=torch.float32, shape=("batch", 3, 8, 8))


def test_what_is_said_first_is_said_again_at_the_end_and_others_between():
    ids, other = torch.arange(20).flip(0).reshape(2, 10), torch.arange(100, 120).reshape(2, 10)
    frames = vectors(2, 3, 10)
    given = {"ids": ids, "frames": frames}
    found = repeating(given, {"ids": other, "frames": 2 * frames}, Signature(inputs=(IDS, FRAMES)))
    assert found is not None
    assert torch.equal(found["ids"], torch.cat([ids[:, :4], other[:, 4:6], ids[:, :4]], 1))
    assert torch.equal(found["frames"], torch.cat([frames[..., :4], 2 * frames[..., 4:6], frames[..., :4]], 2))
    assert torch.equal(given["ids"], ids)


def test_what_numbers_steps_or_says_which_meet_stays():
    given = {
        "ids": torch.tensor([[5, 3, 8, 9, 1]]),
        "positions": torch.arange(5).unsqueeze(0),
        "pairs": torch.ones(1, 1, 5, 5).tril().bool(),
    }
    found = repeating(given, given, Signature(inputs=(IDS, COUNTED, PAIRS)))
    assert found is not None
    assert found["ids"].tolist() == [[5, 3, 8, 5, 3]]
    assert found["positions"] is given["positions"]
    assert found["pairs"] is given["pairs"]


def test_between_stand_neighbours_where_others_are_of_another_size():
    ids = torch.arange(0, 24, 2).reshape(2, 6)
    found = repeating({"ids": ids}, {"ids": ids[:, :5]}, Signature(inputs=(IDS,)))
    assert found is not None
    assert found["ids"].tolist() == [[0, 2, 16, 18, 0, 2], [12, 14, 4, 6, 12, 14]]


def test_what_has_no_time_can_not_repeat_itself():
    image, ids = {"image": vectors(2, 3, 8, 8)}, {"ids": torch.ones(2, 6, dtype=torch.int64)}
    assert repeating(image, image, Signature(inputs=(IMAGE,))) is None
    one = {"ids": ids["ids"][:, :1]}
    assert repeating(one, one, Signature(inputs=(IDS,))) is None
