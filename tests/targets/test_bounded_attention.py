"""Softmax over the last tokens and those that were foretold to matter.

B batch, T time, D width
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import models
from tests.targets.build import build
from thesean.errors import TargetMismatchError
from thesean.targets import Affine, AttentionFacts, PartFacts, Target
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.lifetimes import lifetimes
from thesean.targets.shared.rotation import Rotation
from thesean.targets.shared.worth import attention_past, foretell


def copied(part: PartFacts, **options: Any) -> Any:
    module = build("bounded-attention", part, **options).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output")
    return module


def turned(facts: AttentionFacts) -> AttentionFacts:
    return dataclasses.replace(facts, rotation=Rotation((0, 1), (2, 3), (1.0, 0.1)))


@pytest.fixture(params=[False, True], ids=["plain", "turned"])
def part(request, sequence_part, attention_facts) -> PartFacts:
    facts = attention_facts()
    return sequence_part(attention=turned(facts) if request.param else facts)


def looking_alike(facts: AttentionFacts) -> AttentionFacts:
    """Whose queries look for the same wherever they are, as trained ones mostly do."""
    query = Affine(0.3 * facts.query.weight_OI, 2 * torch.randn(len(facts.query.bias_O)))
    return dataclasses.replace(facts, query=query, plain=True)


def attend(facts: AttentionFacts, x_BTD: torch.Tensor) -> torch.Tensor:
    return facts.output.of(facts.mixed_values(x_BTD, causal=True))


@pytest.mark.parametrize(("window", "kept"), [(1, 20), (21, 1), (8, 13)])
def test_what_holds_every_token_is_the_guides_attention(part, window, kept):
    module, x_BTD = copied(part, window=window, kept=kept), torch.randn(2, 21, 16)
    torch.testing.assert_close(module(x_BTD)[0], attend(part.attention, x_BTD), rtol=1e-4, atol=1e-5)


def test_of_older_tokens_those_that_score_highest_are_seen(part):
    module, x_BTD = copied(part, window=3, kept=2), torch.randn(1, 12, 16)
    with torch.no_grad():
        module.score.weight[:] = 0
        module.score.weight[:, 0] = 1000.0  # the first feature decides
    kept = x_BTD[0, :9, 0].topk(2).indices.tolist()
    at = sorted([*kept, 9, 10, 11])
    facts = part.attention
    query, key, value = (a.of(x_BTD).unflatten(-1, (4, 4)) for a in (facts.query, facts.key, facts.value))
    if facts.rotation is not None:
        query, key = module.rotate(query), module.rotate(key)
    scores_HS = 0.5 * torch.einsum("hc,shc->hs", query[0, 11], key[0, at])
    mean_HC = torch.einsum("hs,shc->hc", scores_HS.softmax(-1), value[0, at])
    torch.testing.assert_close(module(x_BTD)[0][0, -1], facts.output.of(mean_HC.flatten()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 30, [7, 13, 10], [29, 1]])
def test_chunks_equal_the_whole(part, chunks):
    module, x_BTD = copied(part, window=4, kept=5), torch.randn(2, 30, 16)
    torch.nn.init.normal_(module.score.weight)
    whole, last = module(x_BTD)
    state, outputs = module.initial_state(x_BTD), []
    for chunk in x_BTD.split(chunks, 1):
        y, state = module(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last)


def test_which_of_near_tokens_is_kept_is_a_matter_of_degree(part):
    """As in a network's first layer, which sees words without their places: rounding decides between equal ones."""
    module = copied(part, window=4, kept=5).double()
    words, ids = torch.randn(6, 16), torch.randint(6, (40,), generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.score.weight, std=3.0)
    x_BTD = words[ids].unsqueeze(0).double()
    noise_BTD = torch.randn_like(x_BTD)
    errors = [(module(x_BTD + size * noise_BTD)[0] - module(x_BTD)[0]).abs().max() for size in (1e-5, 1e-7, 1e-9)]
    assert errors[0] < 0.05
    assert errors[1] < 0.02 * errors[0]
    assert errors[2] < 0.02 * errors[1]


def test_a_state_says_when_each_token_came_and_what_it_scores(part):
    module, x_BTD = copied(part, window=3, kept=2), torch.randn(1, 9, 16)
    torch.nn.init.normal_(module.score.weight)
    state = module.initial_state(x_BTD)
    key_BGNC, value_BGNK, marks_BG2N = module(x_BTD[:, :2], state)[1][:3]
    assert marks_BG2N[0, 0, 0].tolist() == [0, 0, 0, 0, 3, 4]  # 2 + 1 places, one that fades, then the window
    assert not key_BGNC[..., :4, :].any()
    assert not value_BGNK[..., :4, :].any()
    key_BGNC, value_BGNK, marks_BG2N = module(x_BTD, state)[1][:3]
    assert marks_BG2N[0, 0, 0].tolist() == [1, 1, 1, 2, 3, 4]
    torch.testing.assert_close(value_BGNK[0, :, 3:].transpose(0, 1).flatten(1), module.value(x_BTD)[0, -3:])
    torch.testing.assert_close(marks_BG2N[0, :, 1, 3:].mT, module.score(x_BTD)[0, -3:])


def test_a_padded_row_is_what_it_is_alone(part):
    module, x_BTD = copied(part, window=4, kept=5), torch.randn(2, 30, 16)
    torch.nn.init.normal_(module.score.weight)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :7] = False
    mask[0, 12] = False
    alone = module(x_BTD[:1, mask[0]])
    padded, state = module(x_BTD, mask=mask)
    torch.testing.assert_close(padded[0, mask[0]], alone[0][0], rtol=1e-4, atol=1e-5)
    for found, expected in zip(state, alone[1], strict=True):
        torch.testing.assert_close(found[:1], expected)


def test_scores_are_solved_on_what_later_tokens_look_back_at(sequence_part, attention_facts):
    facts = looking_alike(attention_facts())
    part = sequence_part(attention=facts)
    module = copied(part, window=8, kept=8)
    module.prepare(part, [(torch.randn(8, 200, 16), torch.empty(0)) for _ in range(4)])
    x_TD = torch.randn(200, 16)
    worth_TG, score_TG = attention_past(facts, x_TD, 8)[:180].log(), module.score(x_TD)[:180]
    for worth_T, score_T in zip(worth_TG.unbind(1), score_TG.unbind(1), strict=True):
        assert torch.corrcoef(torch.stack([worth_T, score_T]))[0, 1] > 0.5
    assert foretell(facts, [torch.randn(2, 12, 16)], 8) is None  # too short to tell


def test_scores_are_counted_from_the_middle_one(sequence_part, attention_facts):
    part = sequence_part(attention=looking_alike(attention_facts()))
    module = copied(part, window=8, kept=8)
    x_BTD = torch.randn(16, 200, 16) + torch.linspace(-2, 2, 16)
    before_G = module.lasting.clone()
    module.prepare(part, [(x_BTD[:8], torch.empty(0))])
    assert bool((module.lasting != before_G).all())  # what fades is told from what does not
    above_G = (module.score(x_BTD[8:]) > 0).double().mean((0, 1))
    torch.testing.assert_close(above_G, torch.full_like(above_G, 0.5), atol=0.15, rtol=0)


def test_what_was_foretold_to_matter_is_nearer_than_the_first_ones(sequence_part, attention_facts):
    facts = looking_alike(attention_facts())
    part = sequence_part(attention=facts)
    module, x_BTD = copied(part, window=8, kept=16), torch.randn(4, 200, 16)
    wanted = attend(facts, x_BTD)

    def error() -> float:
        with torch.no_grad():
            return float((module(x_BTD)[0] - wanted)[:, 64:].square().mean())

    before = error()
    module.prepare(part, [(torch.randn(8, 200, 16), torch.empty(0)) for _ in range(4)])
    assert error() < 0.7 * before


def test_what_was_foretold_to_last_outlives_all_that_came_later(part):
    """A token that scores far above the others, in a stream of any length; the rest are outlived, each in its turn."""
    module = copied(part, window=2, kept=3)
    with torch.no_grad():
        module.score.weight.zero_()[:, 0] = 1.0
        module.score.bias.zero_()
        module.lasting.fill_(5.0)
    x_BTD = 0.1 * torch.randn(1, 300, 16)
    x_BTD[0, 0, 0], x_BTD[0, 1, 0] = 6.0, 4.0
    key_BGNC = module(x_BTD)[1][0]
    key_TC = module.key(x_BTD)[0, :, :4]
    if module.rotate is not None:
        key_TC = module.rotate(module.key(x_BTD).unflatten(-1, (4, 4)))[0, :, 0]
    found = [int((key_TC - row_C).norm(dim=1).argmin()) for row_C in key_BGNC[0, 0]]
    assert found[0] == 0
    assert min(found[1:]) > 280


def test_a_token_ages_at_the_pace_at_which_the_attention_looks_back(attention_facts):
    facts = looking_alike(attention_facts())
    inputs = [torch.randn(4, 200, 16) for _ in range(2)]
    worth = foretell(facts, inputs, 8)
    assert worth is not None
    reach = Reach(torch.zeros(4, 1), torch.full((4,), -0.05))
    near = dataclasses.replace(facts, bias=DistanceBias(reach, reach))
    anywhere, nearby = (lifetimes(f, inputs, worth, 8, 8) for f in (facts, near))
    assert nearby.steps_G.sum() < 0.5 * anywhere.steps_G.sum()
    above = torch.cat([worth.of(x_BTD) for x_BTD in inputs]).flatten(0, 1) > anywhere.middle_G
    torch.testing.assert_close(above.double().mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)


def test_in_half_precision_what_is_left_of_a_score_is_counted_in_float32(part):
    module, x_BTD = copied(part, window=4, kept=16).bfloat16(), torch.randn(1, 500, 16).bfloat16()
    whole, last = module(x_BTD)
    state = module.initial_state(x_BTD)
    for chunk in x_BTD.split([1] * 100 + [400], 1):
        y, state = module(chunk, state)
    assert [held.dtype for held in state[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(y, whole[:, 100:], rtol=0.05, atol=0.05)
    torch.testing.assert_close(state[2], last[2], rtol=1e-5, atol=1e-4)


def test_what_was_saved_before_scores_fell_is_read_as_it_was(part):
    module = copied(part, window=4, kept=5)
    config = {name: value for name, value in module.config().items() if name != "fade"}
    before: Any = type(module)(**config)
    assert before.load_state_dict(module.state_dict(), strict=False).unexpected_keys == ["lasting"]
    x_BTD = torch.randn(1, 40, 16)
    scored = before.score(x_BTD)[0, :36, 0]
    marks_BG2N = before(x_BTD)[1][2]
    assert set(marks_BG2N[0, 0, 1, :6].tolist()) == set(scored.topk(6).values.tolist())


def test_what_can_not_be_held_so_is_refused(sequence_part, attention_facts):
    facts = attention_facts()
    reach = Reach(torch.zeros(4, 1), torch.full((4,), -1.0))
    for refused in (
        sequence_part(),
        sequence_part("bidirectional", attention=facts),
        sequence_part(attention=dataclasses.replace(facts, bias=DistanceBias(reach, reach))),
    ):
        with pytest.raises(TargetMismatchError, match="'rnn' or 'linear-attention'"):
            build("bounded-attention", refused)
    assert build("bounded-attention", sequence_part("bidirectional", attention=facts), causal=True).stateful


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_a_hybrid_is_written_and_read_again(make, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    data = [{"input_ids": models.tokens(4, 24, seed=seed)} for seed in range(4)]
    target = Target("bounded-attention", window=4, kept=4)
    converted = thesean.compile(make(layers=1), target, data=data, recipe="fast", progress=False)
    assert any("the last 4 tokens and 4 that were foretold to matter" in note for note in converted.plan.notes)
    exported = converted.export(tmp_path / "model.onnx", stateful="yes")
    assert exported.stateful
    assert not converted.export(tmp_path / "whole.onnx", stateful="no").stateful
    converted.save(tmp_path / "saved")
    ids = models.tokens(2, 24, seed=9)
    again = thesean.load(tmp_path / "saved")
    assert torch.equal(again(input_ids=ids)["logits"], converted(input_ids=ids)["logits"])


def test_scores_that_take_no_gradient_are_not_told_as_frozen_in_the_guide():
    data = [{"input_ids": models.tokens(4, 24, seed=seed)} for seed in range(4)]
    converted = thesean.compile(models.gpt2(1), "bounded-attention", data=data, recipe="fast", progress=False)
    assert not any("frozen" in note for note in converted.report.notes)
