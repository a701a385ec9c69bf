"""Linear attention that keeps the guide's softmax over the last W tokens, and the first few.

B batch, T time, D width, W window, H heads, G heads of keys and values, C width of a head
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build, tensors
from thesean.errors import TargetMismatchError
from thesean.targets import Affine, AttentionFacts
from thesean.targets.shared.distance_bias import HIDDEN, DistanceBias, Reach
from thesean.targets.shared.head_norm import HeadNorm
from thesean.targets.shared.heads import WINDOW, WINDOW_MEMORY, WINDOW_SHARPNESS
from thesean.targets.shared.registry import rebuild
from thesean.targets.shared.rotation import Rotation


def heads_of(facts: AttentionFacts, affine: Affine, x_BTD: torch.Tensor) -> torch.Tensor:
    """(B, H, T, C)."""
    return (x_BTD @ affine.weight_OI.T + affine.bias_O).unflatten(-1, (facts.heads, -1)).transpose(1, 2)


def softmax_attention(facts: AttentionFacts, x_BTD: torch.Tensor) -> torch.Tensor:
    """The guide's own."""
    q, k, v = (heads_of(facts, affine, x_BTD) for affine in (facts.query, facts.key, facts.value))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=facts.scale)
    return mixed.transpose(1, 2).flatten(2) @ facts.output.weight_OI.T + facts.output.bias_O


def phi(facts: AttentionFacts, z_BHTC: torch.Tensor) -> torch.Tensor:
    """softmax([Wz, -Wz]) with W as copied: sharpened, and with what the guide's scale has over 1 / sqrt(C)."""
    gain = WINDOW_SHARPNESS * (facts.scale * z_BHTC.shape[-1] ** 0.5) ** 0.5
    return torch.cat([gain * z_BHTC, -gain * z_BHTC], -1).softmax(-1)


def means(
    facts: AttentionFacts, x_BTD: torch.Tensor, window: int, gate: float, memory: tuple[float, float], sinks: int = 0
) -> torch.Tensor:
    """The target's heads as one weighted mean over all tokens, (B, H, T, K), from the guide's weights alone."""
    q, k, v = (heads_of(facts, affine, x_BTD) for affine in (facts.query, facts.key, facts.value))
    tokens_H = memory[0] * (memory[1] / memory[0]) ** (torch.arange(facts.heads) / (facts.heads - 1))
    step_T = torch.arange(x_BTD.shape[1])
    age_TT = step_T.view(-1, 1) - step_T
    decay_HTT = torch.exp(-(age_TT - window) / tokens_H.view(-1, 1, 1))
    older = math.exp(gate) * decay_HTT * (phi(facts, q) @ phi(facts, k).mT)
    near = (facts.scale * q @ k.mT).exp()
    weights = torch.where((age_TT >= window) & (step_T >= sinks), older, near) * (age_TT >= 0)
    return weights @ v / weights.sum(-1, keepdim=True)


def quadratic(facts: AttentionFacts, x_BTD: torch.Tensor, *settings: Any) -> torch.Tensor:
    mixed = means(facts, x_BTD, *settings)
    return mixed.transpose(1, 2).flatten(2) @ facts.output.weight_OI.T + facts.output.bias_O


@pytest.fixture
def grouped_facts(attention_facts: Any) -> AttentionFacts:
    """Four heads of queries on two of keys and values."""
    facts = attention_facts(scale=0.7)

    def repeated(affine: Affine) -> Affine:
        return Affine(*(rows.unflatten(0, (4, 4))[::2].repeat_interleave(2, 0).flatten(0, 1) for rows in affine))

    return AttentionFacts(
        heads=4, scale=facts.scale, query=facts.query, key=repeated(facts.key), value=repeated(facts.value),
        output=facts.output,
    )  # fmt: skip


def copied(part: Any, **options: Any) -> Any:
    module = build("linear-attention", part, **options).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output")
    return module


@pytest.mark.parametrize("window", [11, 12, 40])
def test_a_window_over_everything_is_the_guides_attention(window, sequence_part, attention_facts):
    facts = attention_facts(scale=0.7)
    module = copied(sequence_part(attention=facts), window=window)
    x_BTD = torch.randn(2, 11, 16)
    torch.testing.assert_close(module(x_BTD)[0], softmax_attention(facts, x_BTD), rtol=1e-5, atol=1e-6)


def assert_the_guides_own(module: Any, facts: AttentionFacts) -> None:
    """Whole, in chunks, and made again from what is saved."""
    x_BTD = torch.randn(2, 30, 16)
    expected = F.linear(facts.mixed_values(x_BTD, causal=True), *facts.output)
    torch.testing.assert_close(module(x_BTD)[0], expected, rtol=1e-4, atol=1e-5)
    pieces, state = [], None
    for chunk_BTD in x_BTD.split((1, 11, 18), 1):
        piece_BTD, state = module(chunk_BTD, state)
        pieces.append(piece_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-5)
    again = rebuild("linear-attention", json.loads(json.dumps(module.config())))
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(x_BTD)[0], module(x_BTD)[0], rtol=0, atol=0)


@pytest.mark.parametrize("normed", [False, True])
def test_a_rotary_guide_is_itself_within_the_window_whole_or_in_chunks(normed, sequence_part, attention_facts):
    norms = tuple(HeadNorm(torch.rand(4) + 0.5, eps) for eps in (1e-6, 1e-2)) if normed else None
    facts = dataclasses.replace(
        attention_facts(scale=0.7), rotation=Rotation((0, 1), (2, 3), (1.0, 0.1)), norms=norms, plain=True
    )
    assert_the_guides_own(copied(sequence_part(attention=facts), window=40), facts)


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


ALIBI = DistanceBias(Reach(torch.zeros(4, 1), -drawn(4)), Reach(torch.zeros(4, 1), torch.zeros(4)))
TABLE = DistanceBias(Reach(drawn(4, 9), torch.zeros(4)), Reach(drawn(4, 3), torch.zeros(4)))


@pytest.mark.parametrize("bias", [ALIBI, TABLE], ids=["a slope", "a table"])
@pytest.mark.parametrize("form", ["heads", "whole"])
def test_a_guide_with_a_bias_of_distance_is_itself_within_the_window(bias, form, sequence_part, attention_facts):
    norms = tuple(HeadNorm(drawn(4, 4), eps, drawn(4, 4), form == "whole") for eps in (1e-6, 1e-2))
    facts = dataclasses.replace(attention_facts(scale=0.7), norms=norms, bias=bias, plain=True)
    assert_the_guides_own(copied(sequence_part(attention=facts), window=40), facts)


def test_a_guide_with_a_bias_of_distance_gets_a_window_unless_told_otherwise(sequence_part, attention_facts):
    part = sequence_part(attention=dataclasses.replace(attention_facts(), bias=ALIBI, plain=True))
    assert build("linear-attention", part).config()["window"] == WINDOW
    assert build("linear-attention", part, window=0).config()["window"] is None
    assert build("linear-attention", sequence_part(attention=attention_facts())).config()["window"] is None


def test_past_the_window_heads_forget_as_fast_as_the_slope_says(sequence_part, attention_facts):
    facts = dataclasses.replace(attention_facts(), bias=ALIBI, plain=True)
    part = sequence_part(attention=facts)
    decay = copied(part, window=4).decay
    torch.testing.assert_close(F.softplus(decay.bias), -ALIBI.behind.slope_H)
    flat = dataclasses.replace(facts, bias=TABLE)
    plain = dataclasses.replace(facts, bias=None)
    biases = [copied(sequence_part(attention=f), window=4).decay.bias for f in (flat, plain)]
    torch.testing.assert_close(*biases)


def test_sinks_are_lowered_as_what_stands_right_before_the_window(sequence_part, attention_facts):
    """Three tokens more than the window holds, all of them sinks, are a window of that length."""
    facts = dataclasses.replace(attention_facts(), bias=ALIBI, plain=True)
    part = sequence_part(attention=facts)
    x_BTD = torch.randn(2, 9, 16)
    whole = F.linear(facts.mixed_values(x_BTD, causal=True), *facts.output)
    with_sinks = copied(part, window=6, sinks=3)
    torch.testing.assert_close(with_sinks(x_BTD)[0][:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


def read_up_to(facts: AttentionFacts, x_BTD: torch.Tensor, ahead: int) -> torch.Tensor:
    """What an attention over all tokens gives each step where `ahead` later ones are there."""
    rows = [
        F.linear(facts.mixed_values(x_BTD[:, : step + ahead + 1], causal=False), *facts.output)[:, step]
        for step in range(x_BTD.shape[1])
    ]
    return torch.stack(rows, 1)


TURNED = Rotation((0, 1), (2, 3), (1.0, 0.1))
BOTH_WAYS = DistanceBias(ALIBI.behind, Reach(torch.zeros(4, 1), -drawn(4)))


@pytest.mark.parametrize(
    "known", [{}, {"rotation": TURNED}, {"bias": TABLE}, {"bias": BOTH_WAYS}], ids=["plain", "turned", "table", "slope"]
)
def test_a_window_with_a_look_ahead_is_the_guides_attention_over_what_is_there_by_then(
    known, sequence_part, attention_facts
):
    facts = dataclasses.replace(attention_facts(scale=0.7), plain=True, **known)
    part = dataclasses.replace(sequence_part(attention=facts), mixing="bidirectional")
    module = copied(part, window=40, lookahead=3)
    x_BTD = torch.randn(2, 30, 16)
    expected = read_up_to(facts, x_BTD, 3)
    torch.testing.assert_close(module(x_BTD)[0], expected, rtol=1e-4, atol=1e-5)
    state, pieces = module.initial_state(x_BTD), []
    for chunk_BTD in x_BTD.split((1, 11, 18), 1):
        piece_BTD, state = module(chunk_BTD, state)
        pieces.append(piece_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 3:], expected[:, :-3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [{"rotation": TURNED}, {"bias": BOTH_WAYS}], ids=["turned", "slope"])
def test_sinks_stand_right_before_a_window_that_looks_ahead(known, sequence_part, attention_facts):
    facts = dataclasses.replace(attention_facts(), plain=True, **known)
    part = dataclasses.replace(sequence_part(attention=facts), mixing="bidirectional")
    module = copied(part, window=6, sinks=3, lookahead=2)
    x_BTD = torch.randn(2, 11, 16)  # the query at 8 has all of them: 3 sinks, 6 tokens up to its own, and 2 more
    whole_BTD = read_up_to(facts, x_BTD, 2)
    torch.testing.assert_close(module(x_BTD)[0][:, 8], whole_BTD[:, 8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [{}, {"rotation": TURNED}, {"bias": BOTH_WAYS}], ids=["plain", "turned", "slope"])
def test_what_is_older_is_balanced_against_all_that_a_look_ahead_sees(known, sequence_part, attention_facts):
    facts = dataclasses.replace(attention_facts(scale=0.7), plain=True, **known)
    part = dataclasses.replace(sequence_part(attention=facts), mixing="bidirectional")
    module = copied(part, window=6, lookahead=3)
    x_BTD = torch.randn(4, 40, 16)
    wanted = read_up_to(facts, x_BTD, 3)

    def error(gate: float) -> float:
        with torch.no_grad():
            module.window.gate_H.fill_(gate)
            return (module(x_BTD)[0] - wanted)[:, 10:-3].square().mean().item()

    tried = [error(gate) for gate in (-24.0, -4.0, -2.0, 0.0, 2.0, 4.0)]
    module.prepare(part, [(x_BTD, x_BTD)])
    balanced = (module(x_BTD)[0] - wanted)[:, 10:-3].square().mean().item()
    assert balanced <= 1.02 * min(tried)


def test_a_window_as_wide_as_the_guides_own_lets_go_of_all_that_is_older(sequence_part, attention_facts):
    hides = torch.zeros(4, 6)
    hides[:, 5] = HIDDEN
    bias = DistanceBias(Reach(hides, torch.zeros(4)), ALIBI.ahead)
    facts = dataclasses.replace(attention_facts(), bias=bias, plain=True)
    part = sequence_part(attention=facts)
    module = copied(part, window=5)
    x_BTD = torch.randn(2, 40, 16)
    module.prepare(part, [(x_BTD, x_BTD)])
    wanted = F.linear(facts.mixed_values(x_BTD, causal=True), *facts.output)
    torch.testing.assert_close(module(x_BTD)[0], wanted, rtol=1e-4, atol=1e-4)


def test_what_a_window_can_not_take_over_is_said(sequence_part, attention_facts):
    facts = dataclasses.replace(attention_facts(), plain=False, differs="a cap on the scores")
    for attention, told in (
        (facts, "their window is not the guide's softmax: a cap on the scores"),
        (None, "their window is not the guide's softmax: no attention was read off"),
        (dataclasses.replace(facts, plain=True, differs=""), ""),
    ):
        part = sequence_part(attention=attention)
        assert build("linear-attention", part, window=4).unlike(part) == told
        assert build("linear-attention", part, window=0).unlike(part) == ""


def test_a_grouped_guide_is_itself_within_the_window_too(sequence_part, grouped_facts):
    module = copied(sequence_part(attention=grouped_facts), window=11)
    x_BTD = torch.randn(2, 11, 16)
    torch.testing.assert_close(module(x_BTD)[0], softmax_attention(grouped_facts, x_BTD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("gate", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [0, 2])
def test_older_tokens_enter_the_same_mean_as_they_leave_the_window(window, gate, sinks, sequence_part, attention_facts):
    facts = attention_facts(scale=0.7)
    module = copied(sequence_part(attention=facts), window=window, sinks=sinks, memory=(2.0, 30.0))
    with torch.no_grad():
        module.window.gate_H.fill_(gate)
    x_BTD = torch.randn(2, 40, 16)
    expected = quadratic(facts, x_BTD, window, gate, (2.0, 30.0), sinks)
    torch.testing.assert_close(module(x_BTD)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [(1,) * 30, (30,), (1, 4, 1, 24), (5, 25), (6, 4, 7, 13), (29, 1)])
@pytest.mark.parametrize("window", [1, 4, 5, 50])
def test_chunks_of_any_size_equal_all_steps_at_once(window, chunks, sequence_part, grouped_facts):
    module = copied(sequence_part(attention=grouped_facts), window=window)
    x_BTD = torch.randn(3, 30, 16)
    full_BTD, full_state = module(x_BTD)
    outputs, state = [], None
    for chunk_BTD in x_BTD.split(chunks, dim=1):
        y_BTD, state = module(chunk_BTD, state)
        outputs.append(y_BTD)
    torch.testing.assert_close(torch.cat(outputs, 1), full_BTD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, full_state, rtol=1e-5, atol=1e-6)


def test_the_state_is_the_linear_one_and_the_last_keys_and_values(sequence_part, grouped_facts):
    module = copied(sequence_part(attention=grouped_facts), window=6, sinks=0)
    x_BTD = torch.randn(3, 10, 16)
    zeros = module.initial_state(x_BTD)
    assert [tuple(s.shape) for s in tensors(zeros)] == [(3, 2, 8, 5), (3, 2, 6, 9)]
    assert not any(s.any() for s in tensors(zeros))
    y_BTD, (linear, held_BGMX) = module(x_BTD, zeros)
    key, value = held_BGMX.transpose(1, 2).split([4, 5], -1)
    torch.testing.assert_close(y_BTD, module(x_BTD)[0], rtol=0, atol=0)
    torch.testing.assert_close(key, module.key(x_BTD)[:, -6:].unflatten(-1, (2, 4)))
    torch.testing.assert_close(value[..., :-1], module.value(x_BTD)[:, -6:].unflatten(-1, (2, 4)))
    assert bool((value[..., -1] == 1).all())
    assert bool((linear[..., -1].sum(-1) > 3.8).all())  # four tokens left, each with features that sum to 1


def test_the_first_tokens_that_leave_the_window_are_kept_and_none_of_them_is_in_the_linear_state(
    sequence_part, grouped_facts
):
    module = copied(sequence_part(attention=grouped_facts), window=6, sinks=3)
    x_BTD = torch.randn(3, 10, 16)
    assert [tuple(s.shape) for s in tensors(module.initial_state(x_BTD))] == [(3, 2, 8, 5), (3, 2, 9, 9)]
    _, (linear, held_BGMX) = module(x_BTD)
    key, value = held_BGMX[:, :, :3].transpose(1, 2).split([4, 5], -1)
    torch.testing.assert_close(key, module.key(x_BTD)[:, :3].unflatten(-1, (2, 4)))
    torch.testing.assert_close(value[..., :-1], module.value(x_BTD)[:, :3].unflatten(-1, (2, 4)))
    torch.testing.assert_close(linear[..., -1].sum(-1), torch.ones(3, 2))  # the fourth alone, which has just left


def test_the_first_tokens_of_a_padded_row_are_its_own(sequence_part, grouped_facts):
    module = copied(sequence_part(attention=grouped_facts), window=4, sinks=2)
    x_BTD = torch.randn(1, 12, 16)
    mask_BT = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    alone_BTD, alone = module(x_BTD[:, mask_BT[0]])
    padded_BTD, padded = module(x_BTD, mask=mask_BT)
    torch.testing.assert_close(padded_BTD[:, mask_BT[0]], alone_BTD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_under_a_rotation_the_first_tokens_stand_right_before_the_window(sequence_part, attention_facts):
    facts = dataclasses.replace(attention_facts(scale=0.7), rotation=Rotation((0, 1), (2, 3), (1.0, 0.1)), plain=True)
    module = copied(sequence_part(attention=facts), window=3, sinks=2)
    with torch.no_grad():
        module.window.gate_H.fill_(-24.0)  # nothing older
    x_BTD = torch.randn(1, 30, 16)
    near_BTD = torch.cat([x_BTD[:, :2], x_BTD[:, -3:]], 1)  # what the last token sees, as a sequence of its own
    expected = F.linear(facts.mixed_values(near_BTD, causal=True), *facts.output)[:, -1]
    torch.testing.assert_close(module(x_BTD)[0][:, -1], expected, rtol=1e-4, atol=1e-5)


def test_before_a_token_leaves_the_window_the_linear_state_is_empty(sequence_part, attention_facts):
    module = copied(sequence_part(attention=attention_facts()), window=6, sinks=0)
    _, (linear, held_BGMX) = module(torch.randn(2, 4, 16))
    assert not linear.any()
    assert held_BGMX[0, 0, :, -1].tolist() == [0, 0, 1, 1, 1, 1]


def test_only_the_past_is_read(sequence_part, attention_facts):
    module = copied(sequence_part(attention=attention_facts()), window=3)
    x_BTD = torch.randn(2, 12, 16)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 5] += 1
    change_T = (module(moved_BTD)[0] - module(x_BTD)[0]).abs().amax((0, 2))
    assert not change_T[:5].any()
    assert bool((change_T[5:] > 1e-7).all())


def test_memories_and_sharpness_default_to_what_suits_the_window(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    assert build("linear-attention", part, window=4).memory == WINDOW_MEMORY
    assert build("linear-attention", part, window=4).sharpness == WINDOW_SHARPNESS
    assert build("linear-attention", part, window=4, memory=(1.0, 2.0), sharpness=1.0).memory == (1.0, 2.0)
    assert build("linear-attention", part).memory != WINDOW_MEMORY


@pytest.mark.parametrize("sinks", [0, 3])
def test_preparation_chooses_the_gate_that_is_nearest_to_softmax_over_everything(sinks, sequence_part, attention_facts):
    facts = attention_facts(scale=0.7)
    part = sequence_part(attention=facts)
    module = copied(part, window=5, sinks=sinks, memory=(2.0, 30.0))
    x_BTD = torch.randn(3, 60, 16)
    module.prepare(part, [(x_BTD, x_BTD), (x_BTD[:, :4], x_BTD[:, :4])])  # the second fits in the window
    q, k, v = (heads_of(facts, affine, x_BTD) for affine in (facts.query, facts.key, facts.value))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=facts.scale)

    gates = torch.arange(-48, 49) / 2
    errors = [(means(facts, x_BTD, 5, float(g), (2.0, 30.0), sinks) - wanted)[:, :, 5:].square() for g in gates]
    least_H = gates[torch.stack([e.sum((0, 2, 3)) for e in errors]).argmin(0)]
    torch.testing.assert_close(module.window.gate_H.detach(), least_H)


def test_heads_that_share_keys_are_balanced_like_heads_with_a_copy_each(sequence_part, grouped_facts):
    part = sequence_part(attention=grouped_facts)
    shared, apart = (copied(part, window=5, sinks=2, memory=(5.0, 5.0), kv_heads=n) for n in (2, 4))
    x_BTD = torch.randn(2, 30, 16)
    for module in (shared, apart):
        module.prepare(part, [(x_BTD, x_BTD)])
    assert torch.equal(shared.window.gate_H, apart.window.gate_H)
    assert shared.window.gate_H.any()


def test_a_head_that_older_tokens_bring_no_nearer_is_left_without_them(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = copied(part, window=59, sinks=0)
    x_BTD = torch.zeros(2, 60, 16)
    x_BTD[:, 30:] = torch.randn(2, 30, 16)
    with torch.no_grad():  # the one token that leaves the window is far from the query, which is its own nearest key
        module.key.weight.mul_(40)
        module.query.weight.copy_(module.key.weight)
    module.prepare(part, [(x_BTD, x_BTD)])
    assert bool((module.window.gate_H <= -10).all())


def test_preparation_on_sequences_within_the_window_leaves_the_gate(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = copied(part, window=8)
    module.prepare(part, [(torch.randn(2, 8, 16), torch.randn(2, 8, 16))])
    assert not module.window.gate_H.any()


def test_gradients_reach_every_parameter_and_are_the_numerical_ones(sequence_part, grouped_facts):
    module = copied(sequence_part(attention=grouped_facts), window=3, sinks=1).double()
    x_BTD = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    module(x_BTD)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x_BTD, fast_mode=True)
    state = tuple(s.detach().requires_grad_() for s in module(x_BTD)[1])
    assert torch.autograd.gradcheck(lambda *s: module(x_BTD.detach(), s)[0], state, fast_mode=True)


def test_the_saved_configuration_makes_the_same_module(sequence_part, grouped_facts):
    module = copied(sequence_part(attention=grouped_facts), window=5)
    with torch.no_grad():
        module.window.gate_H.normal_()
    again = rebuild("linear-attention", module.config()).eval()
    again.load_state_dict(module.state_dict())
    x_BTD = torch.randn(2, 9, 16)
    torch.testing.assert_close(again(x_BTD), module(x_BTD), rtol=0, atol=0)
    assert again.config() == module.config()


def test_flops_count_the_window(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    sizes = {"batch": 1, "time": 1}
    small, large = (build("linear-attention", part, window=w).flops(part, sizes) for w in (8, 9))
    assert large - small == 2 * 4 * (4 + 5)  # one more q.k and one more value with its one, in each of 4 heads
    assert small > build("linear-attention", part).flops(part, sizes)


def test_a_guide_that_turns_queries_and_keys_gets_a_window_unless_none_is_asked_for(sequence_part, attention_facts):
    turned = dataclasses.replace(attention_facts(), rotation=Rotation((0, 1), (2, 3), (1.0, 0.1)))
    chosen = build("linear-attention", sequence_part(attention=turned)).config()
    assert (chosen["window"], chosen["sinks"]) == (64, 4)
    assert build("linear-attention", sequence_part(attention=turned), window=0).config()["window"] is None
    assert build("linear-attention", sequence_part(attention=attention_facts())).config()["window"] is None
    assert build("linear-attention", sequence_part("bidirectional", attention=turned)).config()["window"] is None
    assert build("rnn", sequence_part(attention=turned)).config()["window"] == 64
    assert build("rnn", sequence_part(attention=turned)).kept().startswith("the last 64 tokens and the first 4 keep")


def test_a_configuration_of_before_there_were_sinks_has_none(sequence_part, attention_facts):
    config = copied(sequence_part(attention=attention_facts()), window=5, sinks=0).config()
    assert config.pop("sinks") == 0
    assert rebuild("linear-attention", config).config()["sinks"] == 0


def test_a_window_without_attention_to_copy_has_heads_of_its_own(sequence_part):
    module = build("linear-attention", sequence_part("none"), window=2)
    assert module(torch.randn(2, 5, 16))[0].shape == (2, 5, 16)
    assert module.scale == pytest.approx(16**-0.5)


def test_a_part_that_reads_both_ways_is_refused(sequence_part, attention_facts):
    part = sequence_part("bidirectional", attention=attention_facts())
    with pytest.raises(TargetMismatchError, match=r"^layers\.0: .*found window=4 .* both ways\. Leave window= out"):
        build("linear-attention", part, window=4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window": -1}, "option 'window': Input should be greater than or equal to 0"),
        ({"sinks": 2}, r"found sinks=2 without a window\. Set window=64"),
        ({"sinks": -2, "window": 4}, "option 'sinks'"),
        ({"window": 2.5}, "option 'window'"),
        ({"memory": (0.0, 4.0)}, r"option 'memory\.0': Input should be greater than 0"),
        ({"kv_heads": 0}, "option 'kv_heads'"),
        ({"kv_heads": 3}, r"found kv_heads=3 with 4 heads\. Set kv_heads=2"),
        ({"kv_heads": 8}, r"found kv_heads=8 with 4 heads\. Set kv_heads=4"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, told, sequence_part, attention_facts):
    with pytest.raises(TargetMismatchError, match=told):
        build("linear-attention", sequence_part(attention=attention_facts()), **options)
