"""How near an attention looks.

B batch, T time, D width
"""

from __future__ import annotations

import pytest
import torch

from thesean.targets import Affine, AttentionFacts
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.locality import held_errors, window_errors
from thesean.targets.shared.worth import attention_past, attention_within, meeting

WINDOWS = (8, 16, 32)


def facts(slope: float = 0.0, sharp: float = 1.0) -> AttentionFacts:
    generator = torch.Generator().manual_seed(0)
    maps = [Affine(torch.randn(8, 8, generator=generator), torch.zeros(8)) for _ in range(4)]
    reach = Reach(torch.zeros(2, 1), torch.full((2,), -slope))
    query = Affine(sharp * maps[0].weight_OI, maps[0].bias_O)
    return AttentionFacts(
        heads=2,
        scale=0.5,
        query=query,
        key=maps[1],
        value=maps[2],
        output=maps[3],
        bias=DistanceBias(reach, reach) if slope else None,
        plain=True,
    )


def sequences(batch: int = 3, time: int = 96) -> torch.Tensor:
    return torch.randn(batch, time, 8, generator=torch.Generator().manual_seed(1))


def test_what_falls_off_with_the_distance_is_held_by_a_short_window():
    errors = window_errors(facts(slope=1.0, sharp=0.1), sequences(), None, WINDOWS, sinks=0)
    assert errors[8] < 0.05 < errors[0]
    assert errors[32] < errors[16] < errors[8]


def test_a_mean_of_everything_is_no_window():
    errors = window_errors(facts(sharp=0.0), sequences(), None, WINDOWS, sinks=0)
    assert errors[0] < 1e-9
    assert min(errors[w] for w in WINDOWS) > 0.05


def test_the_error_is_that_of_the_output_without_the_other_tokens():
    given, x_BTD = facts(sharp=2.0), sequences(1)
    wanted: list[torch.Tensor] = []
    near: list[torch.Tensor] = []
    for at in torch.linspace(24, 95, 64).long().tolist():
        for kept, outputs in ((range(at + 1), wanted), ([0, 1, *range(max(2, at - 7), at + 1)], near)):
            x_SD = x_BTD[0, list(kept)]
            heads = []
            for h in range(2):
                rows = slice(4 * h, 4 * h + 4)
                seen = ((given.query, x_BTD[0, at]), (given.key, x_SD), (given.value, x_SD))
                q, k, v = (affine.of(z)[..., rows] for affine, z in seen)
                heads.append((0.5 * k @ q).softmax(0) @ v)
            outputs.append(given.output.of(torch.cat(heads)))
    y, z = torch.stack(wanted), torch.stack(near)
    expected = float((y - z).square().sum() / (y - y.mean(0)).square().sum())
    assert window_errors(given, x_BTD, None, [8], sinks=2)[8] == pytest.approx(expected, rel=1e-4)


def test_padded_steps_make_no_difference():
    x_BTD = sequences(2)
    padded = torch.cat([torch.full((2, 5, 8), 30.0), x_BTD, torch.full((2, 7, 8), -30.0)], 1)
    mask = torch.zeros(2, 108, dtype=torch.bool)
    mask[:, 5:101] = True
    alone = window_errors(facts(sharp=2.0), x_BTD, None, WINDOWS, sinks=4)
    masked = window_errors(facts(sharp=2.0), padded, mask, WINDOWS, sinks=4)
    assert masked == pytest.approx(alone)


def test_what_was_looked_at_most_in_the_window_is_held():
    given, x_BTD = facts(sharp=1.5), sequences(1)
    query_BTHC, key_BTHC = meeting(given, x_BTD)
    worth_TG = attention_within(given, query_BTHC[0], key_BTHC[0], [8])[0]
    wanted, held = [], []
    for at in torch.linspace(24, 95, 64).long().tolist():
        outputs: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for h in range(2):
            best = worth_TG[: at - 7, h].topk(5).indices.tolist()
            rows = slice(4 * h, 4 * h + 4)
            for few, kept in ((True, [*best, *range(at - 7, at + 1)]), (False, list(range(at + 1)))):
                seen = ((given.query, x_BTD[0, at]), (given.key, x_BTD[0, kept]), (given.value, x_BTD[0, kept]))
                q, k, v = (affine.of(z)[..., rows] for affine, z in seen)
                outputs[few].append((0.5 * k @ q).softmax(0) @ v)
        wanted.append(given.output.of(torch.cat(outputs[False])))
        held.append(given.output.of(torch.cat(outputs[True])))
    y, z = torch.stack(wanted), torch.stack(held)
    expected = float((y - z).square().sum() / (y - y.mean(0)).square().sum())
    found = held_errors(given, x_BTD, None, [(8, 5), (96, 1)])
    assert found[8, 5] == pytest.approx(expected, rel=1e-4)
    assert found[96, 1] == pytest.approx(0.0, abs=1e-6)
    assert found[0, 0] == pytest.approx(window_errors(given, x_BTD, None, [], 0)[0])  # of the mean of all


@pytest.mark.parametrize("at_once", [1, 2 * 96 * 20, 2**20])
def test_what_a_token_gets_is_the_same_however_many_queries_are_looked_at_together(at_once, monkeypatch):
    monkeypatch.setattr("thesean.targets.shared.worth._AT_ONCE", at_once)
    given, x_TD = facts(sharp=1.5), sequences(1)[0]
    query_THC, key_THC = (met_1THC[0] for met_1THC in meeting(given, x_TD.unsqueeze(0)))
    scores_HTT = given.scale * query_THC.transpose(0, 1) @ key_THC.permute(1, 2, 0)
    weights_HTT = scores_HTT.masked_fill(torch.ones(96, 96, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    for window in (1, 8, 40):
        age_TT = torch.arange(96).unsqueeze(1) - torch.arange(96)
        near_TH, far_TH = ((weights_HTT * seen).sum(1).mT for seen in (age_TT < window, age_TT >= window))
        seen_T, past_T = (age_TT >= 0).sum(0).clamp(max=window), (age_TT >= window).sum(0).clamp(min=1)
        torch.testing.assert_close(
            attention_within(given, query_THC, key_THC, [8, window])[1], near_TH / seen_T.unsqueeze(1)
        )
        torch.testing.assert_close(attention_past(given, x_TD, window), far_TH / past_T.unsqueeze(1))


def test_rows_too_short_to_tell_tell_nothing():
    assert window_errors(facts(), sequences(2, 9), None, WINDOWS, sinks=0) == {}
