"""B batch, T time, D width, W neurons of the guide, E neurons kept, P taps"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build, tensors
from tests.targets.contract import affine, attention, block, perceptron, sequence
from thesean.distill.closed_form import solve_alone
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import BlockFacts, NormFacts, PartFacts
from thesean.targets.shared.facts import Mixing, MLPFacts


def part_of(facts: BlockFacts, mixing: Mixing = "causal") -> PartFacts:
    return sequence(mixing, block=facts)


def gated(facts: BlockFacts) -> BlockFacts:
    mlp = MLPFacts(up=affine(32, 16, 5), gate=affine(32, 16, 6), down=facts.mlp.down, activation="silu")
    return replace(facts, mlp=mlp)


def rms(facts: BlockFacts) -> BlockFacts:
    """With norms about zero."""
    norms = {n: getattr(facts, n)._replace(centred=False) for n in ("attention_norm", "mlp_norm")}
    return replace(facts, **norms)


def after_sums(facts: BlockFacts) -> BlockFacts:
    """With norms after the sums: the attention reads the stream itself."""
    return replace(facts, attention_norm=None)


def norm_of(norm: NormFacts | None, x_BTD: torch.Tensor) -> torch.Tensor:
    return x_BTD if norm is None else norm.of(x_BTD)


def side_by_side(facts: BlockFacts, x_BTD: torch.Tensor) -> torch.Tensor:
    """x + attention(norm(x)) + mlp(norm'(x)), with the guide's own softmax."""
    mixed_BTV = facts.attention.mixed_values(norm_of(facts.attention_norm, x_BTD), causal=True)
    hidden_BTW = facts.mlp.hidden(norm_of(facts.mlp_norm, x_BTD))
    return x_BTD + facts.attention.output.of(mixed_BTV) + facts.mlp.down.of(hidden_BTW)


GUIDES = {
    "plain": block,
    "gated": lambda: gated(block()),
    "rms": lambda: rms(block()),
    "after": lambda: after_sums(block()),
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("taps", [0, 4])
def test_with_a_window_over_all_tokens_it_is_the_guides_block_with_both_side_by_side(guide, taps):
    facts = GUIDES[guide]()
    part = part_of(facts)
    module = build("parallel-block", part, window=12, sinks=0, taps=taps).eval()
    copied = module.copy_from(part)
    assert copied == ("query", "key", "value", "output", "up", *(("gate",) if guide == "gated" else ()), "down")
    x_BTD = torch.randn(2, 12, 16)
    torch.testing.assert_close(module(x_BTD)[0], side_by_side(facts, x_BTD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", GUIDES)
def test_its_steps_are_the_guides_too(guide):
    facts = GUIDES[guide]()
    part = part_of(facts)
    module = build("parallel-block", part, window=12, sinks=0).eval()
    module.copy_from(part)
    x_BTD = torch.randn(2, 12, 16)
    state, pieces = None, []
    for x_B1D in x_BTD.split(1, 1):
        y_B1D, state = module(x_B1D, state)
        pieces.append(y_B1D)
    torch.testing.assert_close(torch.cat(pieces, 1), side_by_side(facts, x_BTD), rtol=1e-4, atol=1e-5)


def test_its_state_is_that_of_the_heads_and_the_values_that_taps_need():
    part = part_of(block())
    x_BTD = torch.randn(3, 7, 16)
    module = build("parallel-block", part)
    module.copy_from(part)
    _, state = module(x_BTD)
    assert [s.shape for s in tensors(state)] == [(3, 4, 8, 5), (3, 3, 16)]
    torch.testing.assert_close(state[1], module.value(module.norm(x_BTD))[:, -3:])
    assert build("parallel-block", part, taps=1).initial_state(x_BTD).shape == (3, 4, 8, 5)
    windowed = build("parallel-block", part, window=5, sinks=2, taps=2).initial_state(x_BTD)
    assert [tuple(s.shape[1:]) for s in windowed] == [(4, 8, 5), (4, 7, 9), (1, 16)]


def test_features_are_means_then_values_from_the_last_step_back_then_neurons():
    part = part_of(block())
    module = build("parallel-block", part, taps=3).eval()
    module.copy_from(part)
    x_BTD = torch.randn(2, 6, 16)
    features_BTE, _ = module.features(x_BTD)
    _, *taps, neurons = features_BTE.split([16, 16, 16, 16, 32], -1)
    value_BTV = module.value(module.norm(x_BTD))
    for back, tap in enumerate(taps):
        torch.testing.assert_close(tap, F.pad(value_BTV, (0, 0, back, 0))[:, :6])
    torch.testing.assert_close(neurons, F.gelu(module.up(module.norm(x_BTD))))


def test_taps_are_of_all_that_is_read_where_the_values_are_narrower():
    facts = block()
    narrow = replace(facts.attention, value=affine(8, 16, 2), output=affine(16, 8, 3))
    part = part_of(replace(facts, attention=narrow))
    module = build("parallel-block", part, taps=2).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output", "up", "down")
    x_BTD = torch.randn(2, 6, 16)
    features_BTE, (_, past_BPD) = module.features(x_BTD)
    read_BTD = module.norm(x_BTD)
    assert module.value.out_features == 8
    late_BTD = F.pad(read_BTD, (0, 0, 1, 0))[:, :6]
    torch.testing.assert_close(features_BTE[..., 8:40], torch.cat([read_BTD, late_BTD], -1))
    torch.testing.assert_close(past_BPD, read_BTD[:, -1:])


def test_both_ways_taps_reach_as_far_ahead():
    part = part_of(block(), "bidirectional")
    module = build("parallel-block", part, taps=2).eval()
    module.copy_from(part)
    x_BTD = torch.randn(2, 6, 16)
    features_BTE, _ = module.features(x_BTD)
    ahead, own, back = features_BTE[..., 16:64].chunk(3, -1)
    torch.testing.assert_close(own[:, 1:], ahead[:, :-1])
    torch.testing.assert_close(own[:, :-1], back[:, 1:])
    assert not ahead[:, -1].any()
    assert not back[:, 0].any()


def test_what_taps_alone_know_is_found_in_closed_form():
    """A block that adds the value of three steps before: no mean tells steps apart."""
    part = part_of(block())
    module = build("parallel-block", part, hidden=0).eval()
    module.copy_from(part)
    x = torch.randn(64, 12, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = x + F.pad(module.value(module.norm(x)), (0, 0, 3, 0))[:, :12] @ affine(16, 16, 9).weight_OI.T
    solve_alone(module, [(x, y)], ridge=1e-9, where="block")
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guide", GUIDES)
def test_fewer_neurons_are_those_that_the_guides_output_needs(guide):
    """Half of the guide's neurons say nothing: they go, and the block is what it was."""
    facts = GUIDES[guide]()
    silent_W = torch.arange(32) % 2 == 0
    down = facts.mlp.down._replace(weight_OI=facts.mlp.down.weight_OI.masked_fill(silent_W, 0.0))
    facts = replace(facts, mlp=replace(facts.mlp, down=down))
    part = part_of(facts)
    module = build("parallel-block", part, hidden=16, hears=False, window=12, sinks=0).eval()
    examples = [(x_BTD, side_by_side(facts, x_BTD)) for x_BTD in torch.randn(4, 8, 12, 16)]
    module.copy_from(part)
    module.prepare(part, examples)
    x_BTD, y_BTD = examples[0]
    torch.testing.assert_close(module(x_BTD)[0], y_BTD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_neurons_hear_of_late_values_what_the_attention_told_the_guides(guide, mixing):
    """Three tokens, of which taps know each: what a softmax does to them is all that is missed."""
    facts = GUIDES[guide]()
    part = part_of(facts, mixing)
    module = build("parallel-block", part).eval()
    module.copy_from(part)
    assert facts.mlp_norm is not None

    def missed() -> torch.Tensor:
        x_BTD = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(7))
        own_BTD = x_BTD if module.norm is None else module.norm(x_BTD)
        read_BTD = module.read(own_BTD) + module.heard(module.late(own_BTD))
        return (facts.mlp_norm.bare.of(facts.between(x_BTD, mixing == "causal")) - read_BTD).square().mean()

    with torch.no_grad():
        before = missed()
        module.prepare(part, [(x_BTD, x_BTD) for x_BTD in torch.randn(16, 32, 3, 16)])
        assert missed() < 0.3 * before


def test_neurons_can_not_be_chosen_on_what_is_no_number():
    part = part_of(block())
    module = build("parallel-block", part, hidden=8)
    with pytest.raises(NumericalError, match=r"^layers\.0: can't fit its neurons, .* Look for NaN in the data"):
        module.prepare(part, [(torch.full((2, 5, 16), torch.nan), torch.zeros(2, 5, 16))])


def test_the_stream_that_the_mlp_reads_has_the_attentions_output_where_they_are_in_a_row():
    facts = block()
    x_BTD = torch.randn(2, 7, 16)
    mixed_BTV = facts.attention.mixed_values(norm_of(facts.attention_norm, x_BTD), True)
    torch.testing.assert_close(facts.between(x_BTD, True), x_BTD + facts.attention.output.of(mixed_BTV))
    assert replace(facts, in_a_row=False).between(x_BTD, True) is x_BTD


def test_a_norm_goes_into_the_projections_that_read_it():
    norm = block().attention_norm
    assert norm is not None
    x_BTD, read = torch.randn(2, 5, 16), affine(8, 16, 4)
    for each in (norm, norm._replace(centred=False)):
        bare = each._replace(weight_D=torch.ones(16), bias_D=torch.zeros(16))
        torch.testing.assert_close(each.fold(read).of(bare.of(x_BTD)), read.of(each.of(x_BTD)))


def test_a_block_of_nothing_known_gets_heads_and_neurons_by_its_width():
    module = build("parallel-block", sequence())
    assert module.config() | {"heads": 1, "hidden": 64, "taps": 4, "norm": True, "residual": True} == module.config()
    assert module.copy_from(sequence()) == ()


@pytest.mark.parametrize(
    ("part", "options", "found"),
    [
        (part_of(block()), {"hidden": 33}, "found hidden=33. Lower hidden"),
        (replace(sequence(), is_branch=True), {}, "expected a whole block, .* found a branch .* choose target 'rnn'"),
        (part_of(block(), "bidirectional"), {"window": 8}, "found window=8 for a part that reads both ways"),
    ],
)
def test_what_it_can_not_be_built_for_is_told(part, options, found):
    with pytest.raises(TargetMismatchError, match=rf"^layers\.0: target 'parallel-block' .*{found}"):
        build("parallel-block", part, **options)


def test_rnn_is_a_parallel_block_where_a_whole_block_is_told():
    part = part_of(block())
    module = build("rnn", part, scope="part", taps=2)
    assert module.config() == build("parallel-block", part, taps=2).config()
    assert build("rnn", sequence(attention=attention())).family == "linear-attention"
    with pytest.raises(TargetMismatchError, match="taps=2 for a part without an attention"):
        build("rnn", sequence(mlp=perceptron()), taps=2)


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_linear_attention_has_taps_too(mixing):
    part = sequence(mixing, attention=attention())
    plain, tapped = (build("linear-attention", part, taps=taps).eval() for taps in (0, 3))
    for module in (plain, tapped):
        module.copy_from(part)
    x_BTD = torch.randn(2, 9, 16)
    first, second = (m(x_BTD)[0] if m.stateful else m(x_BTD) for m in (plain, tapped))
    torch.testing.assert_close(first, second)  # until they are solved, taps say nothing
    assert tapped.last.in_features - plain.last.in_features == 16 * (3 if mixing == "causal" else 5)


def test_its_norm_is_of_the_kind_and_eps_of_the_guides_first_or_after_its_sums_of_the_second():
    facts = block()
    assert facts.attention_norm is not None
    assert facts.mlp_norm is not None
    first, second = facts.attention_norm._replace(eps=1e-3, centred=False), facts.mlp_norm._replace(eps=1e-2)
    for attention_norm, mlp_norm, kind, eps in (
        (first, second, "rms", 1e-3),
        (None, second, "layer", 1e-2),
        (None, first, "rms", 1e-3),
        (None, None, "layer", 1e-5),
    ):
        part = part_of(replace(facts, attention_norm=attention_norm, mlp_norm=mlp_norm))
        config = build("parallel-block", part).config()
        assert (config["norm_kind"], config["stream_eps"]) == (kind, eps)
