"""B batch, C channels, W channels of the guide's group, S those kept"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.targets.build import build, started
from tests.targets.contract import channels, convolution
from tests.targets.spatial_parts import map_part
from tests.tolerances import VALUE, relative_error
from thesean.distill.closed_form import solve_alone
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import rebuild
from thesean.targets.shared.channel_groups import ChannelFacts, Map, inner_channels
from thesean.targets.shared.channels import (
    Activate,
    Average,
    Concatenate,
    GroupNorm,
    Join,
    Lay,
    Norm,
    Pad,
    Pick,
    Pool,
    Scale,
    Slope,
    Step,
    Weights,
    run_steps,
)


def facts_of(*steps: Step, width: int = 6, size: int = 8, seed: int = 0, copies: int = 1) -> ChannelFacts:
    """Of these steps, with random weights; convolutions make each channel `copies` times over."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[int, Weights] = {}
    values = [torch.zeros(1, width, size, size)]
    for number, step in enumerate(steps):
        if step.kind == "convolution":
            shape = (step.channels_out // copies, step.channels_in // step.groups, *step.kernel)
            weight = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
            bias = 0.1 * torch.randn(shape[0], generator=generator)
            weights[number] = Weights(weight.repeat(copies, *[1] * (weight.ndim - 1)), bias.repeat(copies))
        elif step.kind in ("scale", "norm", "group-norm"):
            rows = 1 + 0.2 * torch.randn(2, step.channels // copies, generator=generator)
            weights[number] = Weights(*rows.repeat(1, copies))
        elif step.kind == "slope":
            weights[number] = Weights(torch.rand(step.channels // copies, generator=generator).repeat(copies))
        values.append(run_steps(steps[: number + 1], weights, values[0]))
    maps = tuple(Map(v.shape[1], math.prod(v.shape[2:])) for v in values)
    return ChannelFacts(steps=tuple(steps), weights=weights, maps=maps)


RELU = Activate(of=1, name="relu")
LINE = {"kernel": (1,), "stride": (1,), "padding": (0,), "dilation": (1,)}
BLOCKS: dict[str, tuple[Step, ...]] = {
    "basic": (convolution(6, 16), RELU, convolution(16, 6, of=2), Join(of=0, other=3, form="sum")),
    "rectified": (
        convolution(6, 16), RELU, convolution(16, 6, of=2), Join(of=0, other=3, form="sum"),
        Activate(of=4, name="relu"),
    ),
    "inverted": (
        convolution(6, 24, 1), Activate(of=1, name="silu"), convolution(24, 24, of=2, groups=24),
        Scale(of=3, channels=24), Average(of=4, size=(1, 1)), convolution(24, 4, 1, of=5), Activate(of=6, name="relu"),
        convolution(4, 24, 1, of=7), Activate(of=8, name="sigmoid"), Join(of=4, other=9, form="product"),
        convolution(24, 6, 1, of=10),
    ),
    "chain": (
        convolution(6, 16), Slope(of=1, channels=16), Pool(of=2, form="max", kernel=(2, 2), stride=(2, 2),
        padding=(0, 0)), Pad(of=3, sizes=(1, 0, 0, 1)), convolution(16, 24, of=4), Activate(of=5, name="gelu"),
        convolution(24, 8, of=6),
    ),
    "squeezed": (
        convolution(6, 16, 1), RELU, convolution(16, 8, 1, of=2), convolution(16, 8, of=2),
        Concatenate(of=3, others=(4,)),
    ),
    "normed": (
        convolution(6, 6, of=0, groups=6), Norm(of=1, channels=6, eps=1e-6), convolution(6, 24, 1, of=2),
        Activate(of=3, name="gelu"), convolution(24, 6, 1, of=4), Join(of=0, other=5, form="sum"),
    ),
    "gated": (
        convolution(6, 16, 1), convolution(6, 16, 1), Activate(of=2, name="sigmoid"),
        Join(of=1, other=3, form="product"), convolution(16, 16, of=4, groups=16), convolution(16, 6, of=5),
    ),
    "tied": (  # channels that are gated by what a later group makes of them
        convolution(6, 16, 1), RELU, convolution(16, 8, of=2), Activate(of=3, name="relu"), convolution(8, 16, of=4),
        Activate(of=5, name="sigmoid"), Join(of=2, other=6, form="product"), convolution(16, 6, of=7),
    ),
    "larger": (
        convolution(6, 16), convolution(6, 16), Join(of=1, other=2, form="maximum"), convolution(16, 6, 1, of=3),
    ),
    "shuffled": (
        Pick(of=0, places=(3, 4, 5)), convolution(3, 16, of=1), Activate(of=2, name="relu"), convolution(16, 4, of=3),
        Pick(of=0, places=(0, 1)), Concatenate(of=4, others=(5,)), Pick(of=6, places=(4, 0, 1, 5, 2, 3)),
    ),
    "laid": (
        Lay(of=0), convolution(6, 24, 1).model_copy(update=LINE | {"of": 1}), Lay(of=2, size=(8, 8)),
        convolution(24, 24, of=3, groups=24), Activate(of=4, name="gelu"), Lay(of=5),
        convolution(24, 6, 1).model_copy(update=LINE | {"of": 6}), Lay(of=7, size=(8, 8)),
    ),
}  # fmt: skip


def part_of(facts: ChannelFacts):
    size = math.isqrt(facts.maps[-1].places)
    return map_part((6, 8, 8), (facts.maps[-1].channels, size, size), channels=facts)


def examples_of(facts: ChannelFacts, count: int = 8, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(8, 6, 8, 8, generator=generator) for _ in range(count)]
    return [(x, run_steps(facts.steps, facts.weights, x)) for x in xs]


def narrowed(facts: ChannelFacts, data: bool = True, **options):
    return started("narrow-channels", part_of(facts), examples_of(facts) if data else (), **options)


def error_of(module, facts: ChannelFacts) -> float:
    ((x, y),) = examples_of(facts, 1, seed=9)
    return relative_error(module(x), y)


@pytest.mark.parametrize("block", BLOCKS)
def test_all_channels_are_the_part(block):
    facts = facts_of(*BLOCKS[block])
    for data in (False, True):
        assert error_of(narrowed(facts, data, ratio=1.0), facts) < VALUE[torch.float32]


@pytest.mark.parametrize("block", BLOCKS)
def test_copies_of_channels_are_folded_into_the_one_that_is_kept(block):
    facts = facts_of(*BLOCKS[block], copies=2)
    assert error_of(narrowed(facts, ratio=0.5), facts) < 1e-3
    assert error_of(narrowed(facts, data=False, ratio=0.5), facts) > 0.05


@pytest.mark.parametrize("block", BLOCKS)
def test_data_choose_better_than_weights(block):
    facts = facts_of(*BLOCKS[block])
    chosen, guessed = (error_of(narrowed(facts, data, ratio=0.5), facts) for data in (True, False))
    assert chosen < 0.9 * guessed
    assert chosen < 1


@pytest.mark.parametrize("block", BLOCKS)
def test_a_solved_layer_reads_its_features(block):
    module = narrowed(facts_of(*BLOCKS[block]))
    ((x, _),) = examples_of(facts_of(*BLOCKS[block]), 1)
    assert hasattr(module, "last") == (block not in ("squeezed", "shuffled", "laid"))
    if hasattr(module, "last"):
        assert relative_error(module.complete(x, *module.features(x)), module(x)) < VALUE[torch.float32]


@pytest.mark.parametrize("block", ["gated", "normed"])
def test_channels_that_come_last_are_the_same_part(block):
    facts = facts_of(*BLOCKS[block])
    first, examples = narrowed(facts), examples_of(facts)
    turned = dataclasses.replace(facts, channels_last=True)
    part = map_part((8, 8, 6), (8, 8, 6), channels=turned)
    last = started("narrow-channels", part, [(x.movedim(1, -1), y.movedim(1, -1)) for x, y in examples])
    x, _ = examples[0]
    assert relative_error(last(x.movedim(1, -1)).movedim(-1, 1), first(x)) < VALUE[torch.float32]
    assert (
        relative_error(last.complete(x.movedim(1, -1), *last.features(x.movedim(1, -1))).movedim(-1, 1), first(x))
        < (VALUE[torch.float32])
    )
    assert last.flops(part, {"batch": 2}) == first.flops(part_of(facts), {"batch": 2})
    assert rebuild("narrow-channels", last.config()).channels_last


def test_what_comes_before_a_rectifier_is_solved_where_the_guide_shows_it():
    """Above zero it is what the part gives; below, what it is already, which the rectifier takes away."""
    module = narrowed(facts_of(*BLOCKS["rectified"]), ratio=0.5)
    ((x, y),) = examples_of(facts_of(*BLOCKS["rectified"]), 1)
    wanted, own = module.wanted(x, y), run_steps(module.steps, module.own_weights(), x, 4)
    assert torch.equal(wanted[y > 0], y[y > 0])
    assert torch.equal(wanted[y == 0], own[y == 0].clamp(max=0))
    assert torch.equal(wanted.relu(), y)
    plain = narrowed(facts_of(*BLOCKS["basic"]))
    assert plain.wanted(x, y) is y


def test_a_rectified_part_is_nearer_once_it_is_solved():
    facts = facts_of(*BLOCKS["rectified"])
    module, before = narrowed(facts, False, ratio=0.5), narrowed(facts, False, ratio=0.5)
    assert solve_alone(module, examples_of(facts), ridge=1e-4, where="here")
    assert error_of(module, facts) < 0.8 * error_of(before, facts)


@pytest.mark.parametrize("block", BLOCKS)
def test_flops_are_those_that_torch_counts(block):
    facts = facts_of(*BLOCKS[block])
    module = narrowed(facts, data=False)
    with FlopCounterMode(display=False) as counted:
        module(torch.randn(3, 6, 8, 8))
    assert module.flops(part_of(facts), {"batch": 3}) == counted.get_total_flops()


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_rebuilt_from_its_config(block):
    module = narrowed(facts_of(*BLOCKS[block]))
    again = rebuild("narrow-channels", module.config()).eval()
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("block", "groups"),
    [
        ("basic", [(16, (0,), (), (2,))]),
        ("inverted", [(24, (0, 7), (2, 3), (5, 10))]),  # a gate's own channels are few, and cost nothing
        ("chain", [(16, (0,), (1,), (4,)), (24, (4,), (), (6,))]),
        ("squeezed", [(16, (0,), (), (2, 3))]),
        ("normed", [(24, (2,), (), (4,))]),
    ],
)
def test_groups_are_what_neither_goes_in_nor_comes_out(block, groups):
    found = facts_of(*BLOCKS[block]).inner
    assert [(c.count, c.makers, c.along, c.readers) for c in found] == groups


def test_channels_between_blocks_are_the_inputs_where_a_sum_hands_them_on():
    steps = (*BLOCKS["basic"], convolution(6, 16, of=4), Activate(of=5, name="relu"), convolution(16, 9, of=6))
    facts = facts_of(*steps)
    assert [c.makers for c in facts.inner] == [(0,), (4,)]


def test_convolutions_in_groups_lose_whole_groups():
    steps = (convolution(6, 24), RELU, convolution(24, 24, of=2, groups=4), convolution(24, 6, of=3))
    facts = facts_of(*steps)
    (channels,) = facts.inner
    assert (channels.makers, channels.along, channels.readers, channels.block) == ((0,), (2,), (3,), 6)
    for ratio, groups in ((1.0, 4), (0.75, 3), (0.5, 2), (0.1, 1)):
        module = narrowed(facts, ratio=ratio)
        assert (module.steps[2].groups, module.steps[2].channels_out) == (groups, 6 * groups)
    assert narrowed(facts, False, width=17).steps[2].groups == 2
    assert error_of(narrowed(facts, ratio=0.75), facts) < error_of(narrowed(facts, False, ratio=0.75), facts)


def test_norms_of_groups_keep_whole_ones():
    steps = (convolution(6, 24), GroupNorm(of=1, channels=24, groups=4, eps=1e-5), convolution(24, 6, of=2))
    facts = facts_of(*steps)
    assert (facts.inner[0].along, facts.inner[0].block) == ((1,), 6)
    module = narrowed(facts, ratio=0.5)
    assert (module.steps[1].groups, module.steps[1].channels) == (2, 12)
    assert error_of(narrowed(facts, ratio=1.0), facts) < VALUE[torch.float32]
    one = (convolution(6, 24), GroupNorm(of=1, channels=24, groups=1, eps=1e-5), convolution(24, 6, of=2))
    assert not facts_of(*one).inner


def test_convolutions_whose_groups_grow_keep_theirs():
    steps = (convolution(6, 16), RELU, convolution(16, 32, of=2, groups=4), convolution(32, 6, of=3))
    assert not inner_channels(steps, facts_of(*steps).maps)


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 8), ({"ratio": 0.7}, 8), ({"ratio": 0.76}, 16), ({"ratio": 0.1}, 8), ({"width": 3}, 3), ({"width": 16}, 16)],
)
def test_channels_come_in_eights_or_as_many_as_are_asked_for(options, kept):
    assert narrowed(facts_of(*BLOCKS["basic"]), False, **options).steps[0].channels_out == kept


def test_few_channels_are_counted_one_by_one():
    steps = (convolution(6, 10), RELU, convolution(10, 6, of=2))
    assert narrowed(facts_of(*steps), False, ratio=0.3).steps[0].channels_out == 3


def test_a_late_group_makes_up_for_an_early_one():
    """What reads the second group is fitted to the guide from what the first one left."""
    facts = facts_of(*BLOCKS["chain"])
    module, part = narrowed(facts, ratio=0.5), part_of(facts)
    alone = build("narrow-channels", part, ratio=0.5).eval()
    alone.copy_from(part)
    apart = error_of(module, facts)
    with torch.no_grad():
        for number in (0, 1):  # the first group's channels as they are chosen without data
            for held, other in zip(module.weights[str(number)].parameters(), alone.weights[str(number)].parameters(),
                                   strict=True):  # fmt: skip
                held.copy_(other)
    assert apart < error_of(module, facts)


def test_numbers_that_are_not_finite_are_told():
    facts = facts_of(*BLOCKS["basic"])
    part = part_of(facts)
    module = build("narrow-channels", part)
    with pytest.raises(NumericalError, match=r"layer3.1: can't choose channels, activations are not finite"):
        module.prepare(part, [(torch.full((2, 6, 8, 8), torch.nan), torch.zeros(2, 6, 8, 8))])


def test_a_guide_of_half_precision_is_narrowed_in_full():
    facts = facts_of(*BLOCKS["basic"], copies=2)
    half = ChannelFacts(
        steps=facts.steps, weights={n: w.to(torch.bfloat16) for n, w in facts.weights.items()}, maps=facts.maps
    )
    part = part_of(half)
    module = build("narrow-channels", part, ratio=0.5).to(torch.bfloat16).eval()
    module.prepare(part, [(x.bfloat16(), y.bfloat16()) for x, y in examples_of(facts)])
    ((x, y),) = examples_of(facts, 1, seed=9)
    assert relative_error(module(x.bfloat16()).float(), y) < 0.03


@pytest.mark.parametrize(
    ("facts", "options", "told"),
    [
        (None, {}, r"\(batch, 6, 8, 8\): cat is not read. Choose target 'bottleneck'"),
        (facts_of(convolution(6, 6)), {}, "no channels that are neither the input's nor the output's"),
        (channels(), {"width": 17}, "at most the 16 channels that there are, found width 17"),
    ],
)
def test_a_part_without_channels_of_its_own_is_refused(facts, options, told):
    part = map_part((6, 8, 8), channels=facts, channels_unread="cat is not read")
    with pytest.raises(TargetMismatchError, match=told):
        build("narrow-channels", part, **options)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"of": 5}, "reads value 5, which is made later"),
        ({"channels_in": -1}, "greater than 0"),
        ({"kernel": [3]}, "as many dimensions"),
        ({"stride": [1, 0]}, "greater than 0"),
        ({"groups": 5}, "in 5 groups"),
        ({"kind": "shell"}, "kind"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_config_that_was_written_by_a_stranger_is_checked(change, told):
    config = {"steps": [convolution(6, 16).model_dump(mode="json") | change]}
    with pytest.raises(Exception, match=told):
        rebuild("narrow-channels", config)
