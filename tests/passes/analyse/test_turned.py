"""B batch, T time, D width, H heads, C width of a head"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured, models
from thesean.passes.analyse.attention import find_attention
from thesean.passes.analyse.turned import turned_unread
from thesean.passes.capture.capture import capture
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition
from thesean.targets import Target


class Latent(nn.Module):
    """One attention over x_BTD whose keys and values come of a normed latent; where it is `turned`, one more feature
    pair of each query and key is, as the step says. `short`: a convolution of two steps makes the latent. `faster`:
    each step turns further than the one before.
    """

    def __init__(self, turned: bool, short: bool = False, faster: bool = False) -> None:
        super().__init__()
        self.turned, self.faster = turned, faster
        self.query, self.down, self.pair = nn.Linear(16, 2 * 8), nn.Linear(16, 6), nn.Linear(16, 2)
        self.norm, self.up, self.out = nn.RMSNorm(6), nn.Linear(6, 2 * 14), nn.Linear(16, 16)
        self.before = nn.Conv1d(6, 6, 2, padding=1) if short else None

    def turn(self, x_BHTC: torch.Tensor) -> torch.Tensor:
        if not self.turned:
            return x_BHTC
        step_T = torch.arange(x_BHTC.shape[2])
        angle_T = (step_T * step_T if self.faster else step_T) * 0.7
        first, second = x_BHTC.unbind(-1)
        cos, sin = angle_T.cos(), angle_T.sin()
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent = self.down(x)
        if self.before is not None:
            latent = self.before(latent.mT)[..., :-1].mT
        key, value = self.up(self.norm(latent)).unflatten(-1, (2, 14)).transpose(1, 2).split([6, 8], -1)
        query, query_pair = self.query(x).unflatten(-1, (2, 8)).transpose(1, 2).split([6, 2], -1)
        key_pair = self.turn(self.pair(x).unsqueeze(1)).expand(-1, 2, -1, -1)
        query, key = torch.cat([query, self.turn(query_pair)], -1), torch.cat([key, key_pair], -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def is_turned(guide) -> bool:
    region = partition(captured.flow_of(guide), "sublayer")[0].region
    values = captured.recorded(guide)
    return turned_unread(region, values, find_attention(region, values))


@pytest.mark.parametrize(("turned", "short"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_part_of_each_key_that_is_turned_is_seen(turned, short):
    guide = capture(models.seeded(Latent, turned, short), models.vectors(2, 6, 16))
    assert is_turned(guide) == turned


class Pooled(nn.Module):
    """One attention whose queries look at a single key, the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.both, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (2, 8)).transpose(1, 2)
        key, value = self.both(x.mean(1, keepdim=True)).unflatten(-1, (4, 8)).transpose(1, 2).chunk(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_a_single_key_has_no_steps_to_be_turned_by():
    assert not is_turned(capture(models.seeded(Pooled), models.vectors(2, 6, 16)))


def test_a_rotation_that_was_read_and_none_at_all_are_not_unread():
    assert not is_turned(captured.llama())
    assert not is_turned(captured.gpt2())


@pytest.mark.parametrize(("turned", "faster"), [(True, True), (True, False), (False, False)])
def test_the_plan_tells_that_positions_are_left_out(turned, faster):
    guide = capture(models.seeded(Latent, turned, faster=faster), models.vectors(2, 6, 16))
    notes = make_plan(guide, Target("linear-attention")).plan.notes
    assert any("turned by their positions in a way that is not read off" in note for note in notes) == faster
