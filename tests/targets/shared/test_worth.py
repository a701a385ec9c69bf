"""T time, D width, H heads of queries, G heads of keys"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.targets.contract import affine
from thesean.targets import Affine, AttentionFacts
from thesean.targets.shared import worth
from thesean.targets.shared.worth import attention_past, attention_within, foretell, meeting


def facts(groups: int = 2) -> AttentionFacts:
    """Four heads of queries, of 16 features."""

    def shared(one: Affine) -> Affine:
        return Affine(
            *(rows.unflatten(0, (groups, -1)).repeat_interleave(4 // groups, 0).flatten(0, 1) for rows in one)
        )

    key, value = (shared(affine(4 * groups, 16, seed)) for seed in (1, 2))
    query, output = affine(16, 16, 0), affine(16, 16, 3)
    return AttentionFacts(heads=4, scale=1.5, query=query, key=key, value=value, output=output, plain=True)


def weights(given: AttentionFacts, x_TD: torch.Tensor) -> torch.Tensor:
    """(H, T, T), queries by keys."""
    query, key = (a.of(x_TD).unflatten(-1, (4, 4)) for a in (given.query, given.key))
    scores_HTT = given.scale * torch.einsum("thc,shc->hts", query, key)
    return scores_HTT.masked_fill(torch.ones(scores_HTT.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("few", [10**6, 1, 4 * 11 * 3])
def test_a_token_is_worth_the_mean_weight_that_its_groups_heads_give_it_later(groups, few, monkeypatch):
    """Whether all queries are looked at together or some at a time."""
    monkeypatch.setattr(worth, "_AT_ONCE", few)
    given, x_TD = facts(groups), torch.randn(11, 16)
    matrix_HTT = weights(given, x_TD)
    found_TG = attention_past(given, x_TD, 4)
    query, key = (met[0] for met in meeting(given, x_TD.unsqueeze(0)))
    near = dict(zip((1, 4), attention_within(given, query, key, (1, 4)), strict=True))
    for token in range(11):
        past_H = matrix_HTT[:, token + 4 :, token].mean(1) if token + 4 < 11 else torch.zeros(4)
        torch.testing.assert_close(found_TG[token], past_H.unflatten(0, (groups, -1)).mean(1))
        for window, near_TG in near.items():
            wanted_H = matrix_HTT[:, token : token + window, token].mean(1)
            torch.testing.assert_close(near_TG[token], wanted_H.unflatten(0, (groups, -1)).mean(1))


def test_what_is_foretold_is_nearer_to_what_comes_than_the_mean_and_needs_long_sequences():
    # all queries look for the same
    given = replace(facts(), query=Affine(0.05 * affine(16, 16, 0).weight_OI, torch.ones(16) / 4))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 60, 16, generator=generator) for _ in range(4)]
    told = foretell(given, inputs[:3], 8)
    assert told is not None
    found, seen = [], []
    for x_TD in inputs[3]:
        seen.append((attention_past(given, x_TD, 8)[:40] + 1e-5).log())
        found.append(told.of(x_TD)[:40])
    wanted, foretold = torch.cat(seen), torch.cat(found)
    assert (foretold - wanted).square().mean() < 0.3 * (wanted - wanted.mean(0)).square().mean()
    # 8 tokens that are told, each by 8 queries past a window of 8
    assert foretell(given, [torch.randn(1, 24, 16)], 8) is not None
    assert foretell(given, [torch.randn(1, 23, 16)], 8) is None
    assert foretell(given, [torch.randn(1, 40 + 20 + 7, 16)], 40) is None  # and by half of a wide one
    assert foretell(given, [torch.randn(1, 40 + 20 + 8, 16)], 40) is not None


def test_what_half_precision_gives_is_summed_in_float():
    given, x_TD = facts(), torch.randn(600, 16)
    half_TG = attention_past(given, x_TD.bfloat16(), 4)
    assert half_TG.dtype == torch.float32
    torch.testing.assert_close(half_TG, attention_past(given, x_TD.bfloat16().float(), 4), rtol=0.05, atol=1e-4)
