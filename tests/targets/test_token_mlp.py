"""B batch, T time, D width"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.targets.build import build
from tests.targets.contract import CHECKS, expect, inputs, output, sequence
from thesean.errors import TargetMismatchError
from thesean.targets import PartFacts, get_family
from thesean.targets.shared.facts import Mixing
from thesean.targets.shared.family import parse_options

STATIC = sequence("bidirectional", time=12)


def params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("mixing", ["none", "mean", "mixer"])
def test_a_block_of_tokens_gets_no_more_weights_than_it_had(mixing):
    block = 12 * 16**2  # attention and MLP of a transformer 16 wide
    module = build("mlp", STATIC, tokens="each", mixing=mixing)
    assert params(module) < 1.1 * block
    assert params(build("mlp", STATIC)) > 4 * block  # flattened
    assert module.skip(inputs(STATIC)) is not None  # the stream goes on


@pytest.mark.parametrize(("mixing", "hears"), [("none", False), ("mean", True), ("mixer", True)])
def test_a_token_hears_of_the_others_where_it_should(mixing, hears):
    module = build("mlp", STATIC, tokens="each", mixing=mixing).eval()
    x_BTD = inputs(STATIC)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 3, 0] += 5
    change_T = (output(module, moved_BTD) - output(module, x_BTD)).abs().amax((0, 2))
    assert change_T[3] > 0
    assert bool((change_T[[0, 1, 2, 4, 11]] > 0).all()) == hears


def test_an_activation_reads_the_token_and_what_it_hears_and_last_reads_the_token_too():
    x_BTD = inputs(STATIC)
    for activation, act in (("gelu", F.gelu), ("relu", F.relu)):
        module = build("token-mlp", STATIC, mixing="mean", activation=activation, width=6)
        hidden = act(module.own(x_BTD) + module.others(x_BTD.mean(1, keepdim=True)))
        torch.testing.assert_close(module(x_BTD), module.last(torch.cat([x_BTD, hidden], -1)))


def test_weights_begin_with_outputs_as_wide_as_inputs_and_twice_as_many():
    module = build("token-mlp", sequence("bidirectional", width=256, time=128), mixing="mixer")
    assert module.own.out_features == 512
    for linear in (module.own, module.others, *module.over_time):
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.03)


def test_flops_are_two_for_each_weight_that_a_token_meets():
    mean, mixer = (build("token-mlp", STATIC, mixing=mixing, width=20) for mixing in ("mean", "mixer"))
    sizes, own = {"batch": 3, "time": 12}, 16 * 20 + (16 + 20) * 16
    assert mean.flops(STATIC, sizes) == 2 * 3 * (12 * own + 16 * 20)  # the mean once a sequence
    assert mixer.flops(STATIC, sizes) == 2 * 3 * 12 * (own + 16 * 20 + 2 * 12 * 16)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_mean_is_that_of_what_is_seen(count):
    module = build("token-mlp", sequence("bidirectional")).eval()
    x_BTD, mask_BT = inputs(sequence()), torch.ones(3, 12, dtype=torch.bool)
    mask_BT[:, count:] = False
    alone_BTD = module(x_BTD[:, :count])
    torch.testing.assert_close(module(x_BTD, mask=mask_BT)[:, :count], alone_BTD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_mixer_keeps_every_promise(check):
    family = get_family("token-mlp")
    with_mixer: Any = parse_options(family, {"mixing": "mixer"})
    mixer = type(family)(**{**vars(family), "build": lambda part, options: family.build(part, with_mixer)})
    expect(mixer.build(STATIC, None).mixing == "mixer", family, "another module than a mixer")
    check(mixer, STATIC)


def test_a_branch_brings_no_stream_of_its_own():
    branch = sequence("bidirectional", is_branch=True)
    for mixing in ("none", "mean"):
        module = build("mlp", branch, tokens="each", mixing=mixing)
        assert module.skip(inputs(branch)) is None
        assert module.norm is None


def test_a_causal_part_gets_tokens_one_by_one_and_nothing_that_hears_of_others():
    module = build("mlp", sequence("causal"), tokens="each")
    assert not module.stateful
    assert output(module, inputs(sequence("causal"))).shape == (3, 12, 16)
    alone = r"Choose Target\('mlp', tokens='each'\), which sees each token alone"
    cases: list[tuple[Mixing, str]] = [
        ("causal", rf"a causal part: no output sees a later token.*{alone}, or target 'rnn'\."),
        ("none", rf"a token-wise part: no output sees another token.*{alone}\.$"),
    ]
    for mixing, found in cases:
        with pytest.raises(TargetMismatchError, match=f"found {found}"):
            build("mlp", sequence(mixing), tokens="each", mixing="mean")


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (sequence("bidirectional"), {"tokens": "each", "mixing": "mixer"}, "one fixed length for a mixer"),
        (STATIC, {"mixing": "mean"}, r"mixing='mean' without tokens='each'"),
        (STATIC, {"tokens": "each", "mixing": "mean", "rank": 3}, "option 'rank'"),
        (
            PartFacts(path="2", input_shape=("batch", 8), output_shape=("batch", 8), mixing="none", params=100),
            {"tokens": "each"},
            r"tokens='each' for \(batch, 8\)",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(part, options, message):
    with pytest.raises(TargetMismatchError, match=message):
        build("mlp", part, **options)


def test_what_is_no_sequence_is_refused_by_that():
    part = PartFacts(path="2", input_shape=("batch", 8), output_shape=("batch", 8), mixing="bidirectional", params=100)
    with pytest.raises(TargetMismatchError, match=r"a sequence \(batch, time, width\)"):
        build("token-mlp", part)
