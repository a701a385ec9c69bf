"""A row of a padded batch is what it is alone, after a part was replaced as before.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.models import tokens, vectors
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.passes.plan.make_plan import make_plan

# right, middle, none
MASK_BT = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1]])


def grown(guide: Captured, target: Any, **settings: Any) -> Hybrid:
    """Untrained replacements barely speak: theirs are made to."""
    torch.manual_seed(0)
    hybrid = build_hybrid(make_plan(guide, target, **settings))
    with torch.no_grad():
        for r in hybrid.replacements:
            nn.init.normal_(hybrid.module(r).last.weight, std=0.3)  # type: ignore[arg-type]
            for name, p in hybrid.module(r).named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(p, std=0.3)
    return hybrid


@pytest.mark.parametrize("target", ["rnn", "gru", "conv", "narrow-heads", "parallel-block"])
def test_an_encoders_row_is_the_sentence_alone(target):
    module = grown(captured.bert(), target).graph_module
    ids = tokens(3, 8, seed=4)
    padded = module(ids, MASK_BT)["last_hidden_state"]
    right = module(ids[:1, :5], MASK_BT[:1, :5])["last_hidden_state"]
    torch.testing.assert_close(padded[:1, :5], right, rtol=0, atol=1e-5)
    moved = ids.where(MASK_BT == 1, (ids + 1) % models.VOCABULARY)
    seen = MASK_BT.bool()
    torch.testing.assert_close(module(moved, MASK_BT)["last_hidden_state"][seen], padded[seen], rtol=0, atol=1e-5)
    assert not torch.allclose(module(ids, torch.ones_like(MASK_BT))["last_hidden_state"][seen], padded[seen])


class Lengths(nn.Module):
    """A convolution, an attention and a cell over x_BTD, all of which leave out what is past a row's length."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        seen_BT = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = self.before(x) * seen_BT[..., None]
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return x + self.attention(x, x, x, key_padding_mask=~seen_BT, need_weights=False)[0]


@pytest.mark.parametrize("target", ["mingru", "ssm"])
def test_lengths_are_a_mask_of_the_part_that_reads_a_product_with_zeros_too(target):
    guide = capture(models.seeded(Lengths), (vectors(3, 7, 6), torch.tensor([7, 5, 6])))
    hybrid = grown(guide, target)
    assert [len(r.masks) for r in hybrid.replacements] == [1, 1]
    x, lengths = vectors(2, 9, 6), torch.tensor([4, 9])
    padded = hybrid.graph_module(x, lengths)
    torch.testing.assert_close(padded[:1, :4], hybrid.graph_module(x[:1, :4], lengths[:1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1:], hybrid.graph_module(x[1:], lengths[1:]), rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_a_mask_of_another_sequence_is_none():
    """A decoder's cross attention reads the encoder's mask: not of the steps that its replacement runs over."""
    pytest.importorskip("transformers")
    from tests import guides

    make = guides.t5()
    ids = tokens(2, 6) % guides.VOCABULARY
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    guide = capture(make, example)
    hybrid = build_hybrid(make_plan(guide, "gru"))
    for r in hybrid.replacements:
        if "decoder" in r.facts.path:
            assert r.masks == ()
        else:
            assert len(r.masks) == 1


def test_a_mask_of_floats_is_a_mask():
    ids = tokens(3, 8, seed=4)
    found = capture(models.bert(), {"input_ids": ids, "attention_mask": MASK_BT.float()})
    module = grown(found, "gru").graph_module
    padded = module(ids, MASK_BT.float())["last_hidden_state"]
    alone = module(ids[:1, :5], MASK_BT[:1, :5].float())["last_hidden_state"]
    torch.testing.assert_close(padded[:1, :5], alone, rtol=0, atol=1e-5)


class Encoder(nn.Module):
    """As encoders are written by hand: a mask of ones and zeros is computed with, in scores and in hidden states."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 5)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        low = (1.0 - mask) * -1e4
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down, strict=True):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            scores = q @ k.mT / 8**0.5
            if self.how == "products":
                both = mask.unsqueeze(2) * mask.unsqueeze(1)
                weights = (scores + (1.0 - both.unsqueeze(1)) * -1e9).softmax(-1) * both.unsqueeze(1)
                x = (x + out((weights @ v).transpose(1, 2).flatten(2))) * mask.unsqueeze(-1)
            else:
                x = x + out(((scores + low[:, None, None]).softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + down(torch.relu(up(x)))
        return self.head(x * mask[..., None])


@pytest.mark.parametrize("how", ["sums", "products"])
@pytest.mark.parametrize("example", [MASK_BT.float(), torch.ones(3, 8)])
def test_a_mask_of_floats_that_is_computed_with_is_read_by_what_is_put_in(how, example):
    ids = tokens(3, 8, seed=4)
    found = capture(models.seeded(Encoder, how), (ids, example))
    hybrid = grown(found, "gru")
    assert [len(r.masks) for r in hybrid.replacements] == [1, 1]
    module = hybrid.graph_module
    padded = module(ids, MASK_BT.float())
    torch.testing.assert_close(padded[:1, :5], module(ids[:1, :5], torch.ones(1, 5)), rtol=0, atol=1e-5)
    seen = MASK_BT.bool()
    moved = ids.where(seen, (ids + 1) % models.VOCABULARY)
    torch.testing.assert_close(module(moved, MASK_BT.float())[seen], padded[seen], rtol=0, atol=1e-5)
