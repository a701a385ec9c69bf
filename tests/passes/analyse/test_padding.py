"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.captured import flow_of, recorded
from tests.models import tokens, vectors
from thesean.passes.analyse.padding import Padding, find_padding
from thesean.passes.capture.capture import capture

WIDTH = 16


class Masked(nn.Module):
    """An attention over x_BTD whose scores or values a mask changes, as `hide` says."""

    def __init__(self, hide: str) -> None:
        super().__init__()
        self.hide = hide
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.steps = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores_BTT = query @ key.mT / 4
        if self.hide == "low scores":
            scores_BTT = scores_BTT + (1.0 - mask[:, None].to(x.dtype)) * -10000.0
        elif self.hide == "where":
            scores_BTT = torch.where(mask[:, None] == 1, scores_BTT, -torch.inf)
        elif self.hide == "lengths":
            steps_T = torch.arange(x.shape[1], device=x.device)
            scores_BTT = scores_BTT.masked_fill((steps_T >= mask[:, None])[:, None], -torch.inf)
        elif self.hide == "zeros":
            value = value * mask[..., None]
            return x + self.out(value)
        elif self.hide == "hidden is one":
            scores_BTT = scores_BTT.masked_fill(mask[:, None].bool(), -torch.inf)
        elif self.hide == "added":
            scores_BTT = scores_BTT + mask[:, None]
        elif self.hide == "ones are hidden":
            scores_BTT = scores_BTT + mask[:, None] * -1e9
        elif self.hide == "learnt":
            scores_BTT = scores_BTT + self.steps(mask[..., None])
        elif self.hide == "nothing":
            value = value + mask[..., None]
        return x + self.out(scores_BTT.softmax(-1) @ value)


def masks_of(guide: nn.Module, *inputs: torch.Tensor) -> tuple[Padding, ...]:
    found = capture(guide.eval(), inputs)
    return find_padding(flow_of(found), recorded(found))


def masked(hide: str, dtype: torch.dtype = torch.int64, low: float = -1e4) -> tuple[Padding, ...]:
    mask = torch.full((3,), 7) if hide == "lengths" else torch.ones(3, 7, dtype=dtype)
    if hide in ("added", "ones are hidden", "hidden is one"):
        mask = torch.zeros_like(mask)
    if hide == "added":
        mask[0, 5:] = low
    return masks_of(models.seeded(Masked, hide), vectors(3, 7, WIDTH), mask)


@pytest.mark.parametrize(
    ("hide", "rules"),
    [
        ("low scores", ["one"]),
        ("where", ["one"]),
        ("lengths", ["false"]),
        ("zeros", ["one"]),
        ("hidden is one", ["true", "false", "zero"]),
        ("nothing", []),
    ],
)
def test_a_mask_is_known_by_what_it_hides(hide, rules):
    found = [mask.rule for mask in masked(hide)]
    assert len(found) == min(1, len(rules))
    assert set(found) <= set(rules)


@pytest.mark.parametrize(
    ("hide", "rule"),
    [("low scores", "one"), ("where", "one"), ("zeros", "one"), ("added", "additive"), ("ones are hidden", "zero")],
)
def test_a_mask_of_floats_is_known_by_what_it_hides(hide, rule):
    assert [mask.rule for mask in masked(hide, torch.float32)] == [rule]


def test_floats_that_are_no_mask_are_none():
    for hide, other in (("learnt", torch.ones(3, 7)), ("zeros", torch.rand(3, 7) + 0.5)):
        assert masks_of(models.seeded(Masked, hide), vectors(3, 7, WIDTH), other) == ()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hugging_face_model_has_one_mask_for_all_layers(attention):
    guide = captured.bert(attention)
    assert [m.rule for m in find_padding(flow_of(guide), recorded(guide))] == ["true"]


def test_a_network_without_padding_has_no_mask():
    for guide in (captured.gpt2(), captured.encoder(), captured.tabled()):
        assert find_padding(flow_of(guide), recorded(guide)) == ()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        return self.layers(x, src_key_padding_mask=padded)


def test_torchs_own_encoder_hides_by_minus_infinity():
    found = masks_of(models.seeded(Layers), vectors(3, 7, WIDTH), torch.zeros(3, 7, dtype=torch.bool))
    assert found
    assert {m.rule for m in found} == {"additive"}


class SkipsZero(nn.Module):
    """Tokens whose id is 0 are padding, and nothing else says so."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(32, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.types = nn.Embedding(2, WIDTH)

    def forward(self, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.types(types)
        return x + self.attention(x, x, x, key_padding_mask=ids == 0, need_weights=False)[0]


def test_a_mask_made_of_the_tokens_is_found_and_token_types_are_none():
    found = masks_of(models.seeded(SkipsZero), tokens(3, 7), torch.zeros(3, 7, dtype=torch.int64))
    assert len(found) == 1


class PlacesTokens(nn.Module):
    """A mask that says first where tokens stand, by which queries and keys are turned, and then which are hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        angle_BT1 = (mask.cumsum(1) - 1).clamp(min=0)[..., None] * 0.5
        cos, sin = angle_BT1.cos(), angle_BT1.sin()
        turned = []
        for each in (query, key):
            a, b = each.chunk(2, -1)
            turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
        scores_BTT = (turned[0] @ turned[1].mT / 4).masked_fill(mask[:, None] == 0, -1e9)
        return x + self.out(scores_BTT.softmax(-1) @ value)


def test_a_mask_that_places_tokens_before_it_hides_them_is_found():
    found = masks_of(models.seeded(PlacesTokens), vectors(3, 7, WIDTH), torch.ones(3, 7, dtype=torch.int64))
    assert [m.rule for m in found] == ["one"]


@pytest.mark.parametrize(
    ("rule", "value", "seen"),
    [
        ("true", torch.tensor([[True, False]]), [True, False]),
        ("false", torch.tensor([[False, True]]), [True, False]),
        ("one", torch.tensor([[1, 0]]), [True, False]),
        ("zero", torch.tensor([[0, 1]]), [True, False]),
        ("additive", torch.tensor([[0.0, -10000.0]]), [True, False]),
        ("additive", torch.tensor([[0.0, -100.0]]), [True, False]),
        ("additive", torch.tensor([[0.0, -torch.inf]]), [True, False]),
    ],
)
def test_a_mask_is_read_by_its_rule(rule, value, seen):
    mask = Padding(node="mask", rule=rule)
    assert mask.seen(value)[0].tolist() == seen
    assert mask.seen(mask.all_seen(value)).all()


class LowOrSeen(nn.Module):
    """Scores of which each layer hides some by what it makes of a mask of ones, (B, T) like it."""

    def __init__(self, low: str) -> None:
        super().__init__()
        self.low, self.qkv, self.out = low, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        added = ((1 - mask)[:, None] * -10000.0) if self.low == "numbers" else torch.log(mask + 1e-9)[:, None]
        return x + self.out((query @ key.mT / 4 + added).softmax(-1) @ value)


@pytest.mark.parametrize("low", ["numbers", "logarithms"])
def test_what_is_made_of_a_mask_is_read_the_right_way_round(low):
    """Where one step alone is seen, it hardly moves what sees it, as a hidden one would not; and log(1e-9) is -21."""
    mask_BT = torch.ones(3, 7)
    mask_BT[1, 4:] = 0
    (found,) = masks_of(models.seeded(LowOrSeen, low), vectors(3, 7, WIDTH), mask_BT)
    assert (found.node, found.rule) in [("mask", "one"), ("rsub", "zero")]
