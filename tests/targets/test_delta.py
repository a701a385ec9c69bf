"""B batch, T time, D width, H heads, F width of a key, K width of a value"""

from __future__ import annotations

import pytest
import torch

from tests.targets.build import build
from tests.targets.contract import sequence
from thesean.errors import ArtifactError, TargetMismatchError
from thesean.targets import rebuild


def test_the_features_are_the_recurrence_on_the_modules_own_projections(sequence_part):
    module = build("delta", sequence_part(), heads=2).double().eval()
    with torch.no_grad():
        module.rate.weight.normal_()
        module.decay.weight.normal_()
    x_BTD = torch.randn(3, 11, 16, dtype=torch.float64)
    features_BTE, state_BHFK = module.features(x_BTD)

    def heads(linear: torch.nn.Linear) -> torch.Tensor:
        return linear(x_BTD).unflatten(-1, (2, 8))

    query, key = (z / z.norm(dim=-1, keepdim=True) for z in (heads(module.query), heads(module.key)))
    beta_BTH = torch.sigmoid(module.rate(x_BTD))
    decay_BTH = torch.sigmoid(-module.decay(x_BTD))  # exp(-softplus)
    held_BHFK = torch.zeros(3, 2, 8, 8, dtype=torch.float64)
    for t in range(11):
        erase_BHFF = torch.eye(8) - beta_BTH[:, t, :, None, None] * key[:, t, :, :, None] * key[:, t, :, None, :]
        write_BHFK = beta_BTH[:, t, :, None, None] * key[:, t, :, :, None] * heads(module.value)[:, t, :, None, :]
        held_BHFK = decay_BTH[:, t, :, None, None] * erase_BHFF.double() @ held_BHFK + write_BHFK
        expected_BE = torch.einsum("bhf,bhfk->bhk", query[:, t], held_BHFK).flatten(1)
        torch.testing.assert_close(features_BTE[:, t], expected_BE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state_BHFK, held_BHFK, rtol=1e-5, atol=1e-6)


def test_projections_are_the_guides_where_it_has_attention(sequence_part, attention_facts):
    facts = attention_facts()
    part = sequence_part(attention=facts)
    module = build("delta", part)
    assert module.copy_from(part) == ("query", "key", "value", "output")
    for linear, affine in (
        (module.query, facts.query),
        (module.key, facts.key),
        (module.value, facts.value),
        (module.last, facts.output),
    ):
        assert torch.equal(linear.weight.detach(), affine.weight_OI)
        assert torch.equal(linear.bias.detach(), affine.bias_O)


def test_heads_of_another_width_than_the_parts_are_copied_too(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts(heads=2, head_width=5))
    module = build("delta", part)
    assert module.initial_state(torch.zeros(3, 1, 16)).shape == (3, 2, 5, 5)
    assert module.copy_from(part) == ("query", "key", "value", "output")


def test_other_heads_than_the_guides_copy_nothing(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    assert build("delta", part, heads=2).copy_from(part) == ()
    assert build("delta", sequence_part()).copy_from(sequence_part()) == ()


def test_the_second_half_of_the_heads_reads_backwards(sequence_part, attention_facts):
    module = build("delta", sequence_part("bidirectional", attention=attention_facts(heads=3))).eval()
    assert module.ahead == 2
    x_BTD = torch.randn(2, 9, 16)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 4] += 1
    change_TH = (module.features(moved_BTD)[0] - module.features(x_BTD)[0]).unflatten(-1, (3, 4)).abs().amax((0, 3))
    assert not change_TH[:4, :2].any()
    assert (change_TH[4:, :2] > 0).all()
    assert not change_TH[5:, 2].any()
    assert (change_TH[:5, 2] > 0).all()


def test_one_head_can_not_read_both_ways():
    config = build("delta", sequence("bidirectional"), heads=2).config()
    with pytest.raises(ArtifactError, match="does not fit: a bidirectional delta rule needs 2 heads or more"):
        rebuild("delta", {**config, "heads": 1})


@pytest.mark.parametrize(("mixing", "heads"), [("causal", [1, 2, 2, 1]), ("bidirectional", [2, 2, 2, 3])])
def test_without_attention_heads_are_one_per_32_features_and_enough_for_the_directions(mixing, heads, sequence_part):
    widths = (16, 64, 70, 15)
    assert [build("delta", sequence_part(mixing, width_in=width)).heads for width in widths] == heads


def test_a_guides_single_head_is_cut_in_two_for_two_directions(sequence_part, attention_facts):
    part = sequence_part("bidirectional", attention=attention_facts(heads=1, head_width=16))
    assert build("delta", part).heads == 2


def test_memories_are_spread_over_each_direction_and_a_lone_head_has_the_longest(sequence_part):
    def memories(mixing: str, heads: int) -> torch.Tensor:
        module = build("delta", sequence_part(mixing), heads=heads, memory=(1.0, 16.0))
        return 1 / torch.nn.functional.softplus(module.decay.bias.detach())

    torch.testing.assert_close(memories("causal", 1), torch.tensor([16.0]))
    torch.testing.assert_close(memories("bidirectional", 4), torch.tensor([1.0, 16.0, 1.0, 16.0]))


@pytest.mark.parametrize(
    ("mixing", "heads", "message"),
    [
        ("causal", 3, r"layers.0: .* found width 16 with 3 heads .* Set heads=1"),
        ("bidirectional", 1, r"found width 16 with 1 head for .*, a bidirectional part. Set heads=2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(mixing, heads, message, sequence_part):
    with pytest.raises(TargetMismatchError, match=message):
        build("delta", sequence_part(mixing), heads=heads)


def test_the_memory_stays_bounded_over_a_long_sequence(sequence_part, attention_facts):
    part = sequence_part(attention=attention_facts())
    module = build("delta", part, memory=(1e6, 1e6)).eval()
    module.copy_from(part)
    x_BTD = torch.randn(1, 2000, 16)
    features_BTE, _ = module.features(x_BTD)
    values_BTHK = module.value(x_BTD).unflatten(-1, (4, 4))
    # each of the 4 orthogonal directions of a key holds a value's length at most twice over
    assert features_BTE.unflatten(-1, (4, 4)).norm(dim=-1).amax() < 4 * values_BTHK.norm(dim=-1).amax()


def test_untrained_each_token_replaces_half_of_what_is_held_at_its_key(sequence_part):
    module = build("delta", sequence_part(), heads=2)
    x_BTD = torch.randn(2, 5, 16)
    assert torch.equal(torch.sigmoid(module.rate(x_BTD)), torch.full((2, 5, 2), 0.5))
    assert torch.equal(module.decay(x_BTD), module.decay.bias.expand(2, 5, 2))  # all tokens are forgotten alike
    for linear in (module.query, module.key, module.value):
        assert not linear(torch.zeros(16)).any()
