"""What holds for every target: `check_family(family, part, folder)` runs it on one, registered or not.

Each check raises AssertionError with the family's name. Modules are drawn from a seed, so that a failure repeats.
B batch, T time, D width, C channels
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.targets.build import tensors
from tests.tolerances import VALUE, relative_error
from thesean.distill.closed_form import solve_alone
from thesean.errors import TargetMismatchError
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.targets import (
    Affine,
    AttentionFacts,
    BlockFacts,
    Family,
    MLPFacts,
    NormFacts,
    PartFacts,
    State,
    TargetModule,
    get_family,
    targets,
)
from thesean.targets.shared.channel_groups import ChannelFacts, Map
from thesean.targets.shared.channels import Activate, Convolution, Join, Step, Weights
from thesean.targets.shared.facts import Dim, Mixing
from thesean.targets.shared.family import parse_options

SIZES = {"batch": 3, "time": 12}


# parts as the passes would describe them


def sequence(mixing: Mixing = "causal", width: int = 16, time: Dim = "time", **facts: Any) -> PartFacts:
    shape = ("batch", time, width)
    return PartFacts(path="layers.0", input_shape=shape, output_shape=shape, mixing=mixing, params=1000, **facts)


def feature_map(size: int = 8, width: int = 6, **facts: Any) -> PartFacts:
    shape = ("batch", width, size, size)
    return PartFacts(
        path="layer3.1", input_shape=shape, output_shape=shape, mixing="bidirectional", params=10_000, **facts
    )


def affine(out: int, into: int, seed: int) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    return Affine(torch.randn(out, into, generator=generator) * into**-0.5, torch.randn(out, generator=generator) * 0.1)


def attention(width: int = 16, heads: int = 4) -> AttentionFacts:
    query, key, value, output = (affine(width, width, seed) for seed in range(4))
    return AttentionFacts(heads=heads, scale=0.5, query=query, key=key, value=value, output=output, plain=True)


def perceptron(width: int = 16, hidden: int = 32) -> MLPFacts:
    return MLPFacts(up=affine(hidden, width, 0), down=affine(width, hidden, 1), activation="gelu")


def convolution(into: int, out: int, kernel: int = 3, of: int = 0, groups: int = 1) -> Convolution:
    pad = kernel // 2
    return Convolution(
        of=of, channels_in=into, channels_out=out, kernel=(kernel, kernel), stride=(1, 1), padding=(pad, pad),
        dilation=(1, 1), groups=groups,
    )  # fmt: skip


def channels(width: int = 6, hidden: int = 16, size: int = 8) -> ChannelFacts:
    """Of a block x + conv(relu(conv(x)))."""
    generator = torch.Generator().manual_seed(0)
    steps: tuple[Step, ...] = (
        convolution(width, hidden),
        Activate(of=1, name="relu"),
        convolution(hidden, width, of=2),
        Join(of=0, other=3, form="sum"),
    )
    weights = {
        n: Weights(torch.randn(out, into, 3, 3, generator=generator) * (9 * into) ** -0.5, torch.zeros(out))
        for n, (into, out) in {0: (width, hidden), 2: (hidden, width)}.items()
    }
    maps = tuple(Map(count, size * size) for count in (width, hidden, hidden, width, width))
    return ChannelFacts(steps=steps, weights=weights, maps=maps)


def block(width: int = 16, in_a_row: bool = True) -> BlockFacts:
    """Of an attention and an MLP, each behind a LayerNorm."""
    weights = (affine(width, 1, seed) for seed in (7, 8))
    first, second = (NormFacts(1 + 0.1 * a.weight_OI.flatten(), a.bias_O, 1e-5, True) for a in weights)
    return BlockFacts(
        attention=attention(width), mlp=perceptron(width), attention_norm=first, mlp_norm=second, in_a_row=in_a_row
    )


PARTS: dict[str, PartFacts] = {
    "causal": sequence("causal"),
    "bidirectional": sequence("bidirectional"),
    "token-wise": sequence("none"),
    "fixed length": sequence("bidirectional", time=12),
    "causal, of fixed length": sequence("causal", time=12),
    "attention": sequence("causal", attention=attention()),
    "perceptron": sequence("none", mlp=perceptron()),
    "block": sequence("causal", block=block()),
    "block, both ways": sequence("bidirectional", block=block()),
    "feature map": feature_map(),
    "convolutions": feature_map(channels=channels()),
    "vector": PartFacts(path="2", input_shape=("batch", 8), output_shape=("batch", 8), mixing="none", params=100),
}


# which families take which parts


def fits(family: Family, part: PartFacts) -> bool:
    try:
        with torch.device("meta"):
            build(family, part)
    except TargetMismatchError:
        return False
    return True


def recurrent_families() -> tuple[str, ...]:
    """Those whose module for a causal part carries a state: a new one is among them without a list to edit."""
    return tuple(name for name, module in _causal(tuple(targets())) if module.stateful)


def stateful_modules() -> tuple[str, ...]:
    """The recurrent families that have a module of their own; the others pick one of these."""
    return tuple(name for name, module in _causal(tuple(targets())) if module.stateful and module.family == name)


@cache
def _causal(names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """A module for a causal part of each family that takes one; `names` are those registered by now."""
    families = [(name, get_family(name)) for name in names]
    return tuple((name, build(family, sequence())) for name, family in families if fits(family, sequence()))


def build(family: Family, part: PartFacts, **options: Any) -> Any:
    """A fresh module, always the same one; raises TargetMismatchError as a plan does."""
    given = parse_options(family, options)
    family.check(part, given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family.build(part, given)


def inputs(part: PartFacts, batch: int = 3, time: int = 12, seed: int = 1) -> torch.Tensor:
    sizes = {"batch": batch, "time": time}
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in part.input_shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(module: TargetModule, x: torch.Tensor) -> torch.Tensor:
    y = module(x)
    return y[0] if module.stateful else y


def expect(condition: bool, family: Family, found: str) -> None:
    # not `assert`: pytest explains asserts in tests alone, and this one names the family
    if not condition:
        raise AssertionError(f"{family.name}: {found}")


def same(family: Family, found: torch.Tensor, expected: torch.Tensor, what: str, bound: float = 1e-5) -> None:
    # an output that is zero has no scale of its own
    close = found.shape == expected.shape and torch.allclose(found, expected, rtol=bound, atol=bound)
    expect(close, family, f"{what}: found {tuple(found.shape)}, expected the same numbers as {tuple(expected.shape)}")


# the checks


def check_it_describes_itself(family: Family, part: PartFacts) -> None:
    lower = family.name == family.name.lower().replace("_", "-").strip()
    expect(bool(family.name) and lower, family, "expected a name in lower case with hyphens")
    expect(bool(family.summary) and "\n" not in family.summary, family, "expected a summary of one line")
    try:
        build(family, part, no_such_option=1)
    except TargetMismatchError as error:
        expect("no_such_option" in str(error), family, f"an unknown option is refused without its name: {error}")
    else:
        expect(False, family, "an unknown option is not refused: derive the options from thesean.targets.Options")


def check_a_part_that_it_does_not_take_is_refused_by_path_and_target(family: Family, part: PartFacts) -> None:
    odd: list[tuple[tuple[Dim, ...], tuple[Dim, ...]]] = [
        (("batch",), ("batch",)),
        (("batch", "time", "width"), ("batch", "time", "width")),
        (("batch", "time", 16), ("batch", "half", 16)),
        (("batch", 3, "height", "width"), ("batch", 3, "height", "width")),
    ]
    for input_shape, output_shape in odd:
        stranger = PartFacts(path="stem", input_shape=input_shape, output_shape=output_shape, mixing="none", params=1)
        try:
            build(family, stranger)
        except TargetMismatchError as error:
            told = str(error).startswith("stem: target ") and "expected" in str(error) and "found" in str(error)
            expect(told, family, f"a refusal names part, found, expected and what to do: {error}")


def check_the_output_has_the_parts_shape(family: Family, part: PartFacts) -> None:
    module = build(family, part).eval()
    for batch, time in ((3, 12), (1, 12)) if part.input_shape[1] != "time" else ((3, 12), (1, 5), (2, 1)):
        sizes = {"batch": batch, "time": time}
        wanted = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in part.output_shape)
        y = output(module, inputs(part, batch, time))
        expect(tuple(y.shape) == wanted, family, f"the output is {tuple(y.shape)}, expected {wanted}")
        expect(bool(y.isfinite().all()), family, "the output holds NaN or infinities")


def check_silence_is_a_number(family: Family, part: PartFacts) -> None:
    """Texts may begin with tokens of nothing, images be black: how large an input is may not be divided by."""
    module = build(family, part).eval()
    x = torch.zeros_like(inputs(part)).requires_grad_()
    y = output(module, x)
    y.square().sum().backward()
    expect(bool(y.isfinite().all()), family, "of zeros the output holds NaN or infinities")
    slopes = [p.grad for p in (x, *module.parameters()) if p.grad is not None]
    expect(all(bool(slope.isfinite().all()) for slope in slopes), family, "at zeros a gradient is NaN or infinite")


def check_the_meta_device_builds_the_same_shapes(family: Family, part: PartFacts) -> None:
    """A plan counts parameters and FLOPs of a module that has no values."""
    module = build(family, part)
    with torch.device("meta"):
        outline = build(family, part)
    for name, value in module.state_dict().items():
        found = outline.state_dict().get(name)
        expect(found is not None and found.shape == value.shape, family, f"{name} differs on the meta device")
    flops = [m.flops(part, SIZES) for m in (module, outline)]
    expect(flops[0] == flops[1] and isinstance(flops[0], int), family, f"flops {flops}: an int that needs no values")
    twice = module.flops(part, {**SIZES, "batch": 6})
    expect(twice == 2 * flops[0] >= 0, family, f"{flops[0]} flops for 3 examples and {twice} for 6")


def check_a_module_is_rebuilt_from_its_json_config(family: Family, part: PartFacts) -> None:
    module = build(family, part).eval()
    again = type(module)(**json.loads(json.dumps(module.config()))).eval()
    again.load_state_dict(module.state_dict())
    same(family, output(again, inputs(part)), output(module, inputs(part)), "rebuilt from config()", bound=0)
    expect(again.config() == module.config(), family, f"config() gives {again.config()}, then {module.config()}")


def check_steps_in_chunks_equal_all_steps_at_once(family: Family, part: PartFacts) -> None:
    module = build(family, part).eval()
    if not module.stateful:
        return
    x_BTD = inputs(part)
    whole_BTD, last = module(x_BTD)
    zeros = module.initial_state(x_BTD)
    for zero in tensors(zeros):
        expect(zero.shape[0] == 3 and not zero.any(), family, "a sequence starts from zeros, batch first")
    shapes = [[s.shape for s in tensors(each)] for each in (zeros, last)]
    expect(shapes[0] == shapes[1], family, f"a state of {shapes[0]} becomes one of {shapes[1]}")
    same(family, module(x_BTD, zeros)[0], whole_BTD, "no state and zeros", bound=0)
    for chunks in ((1, 5, 1, 5), (1,) * 12, (11, 1)):
        pieces: list[torch.Tensor] = []
        state: State | None = None
        for chunk_BTD in x_BTD.split(chunks, 1):
            y_BTD, state = module(chunk_BTD, state)
            pieces.append(y_BTD)
        same(family, torch.cat(pieces, 1), whole_BTD, f"chunks of {chunks} and the whole")
        assert state is not None
        for one, other in zip(tensors(state), tensors(last), strict=True):
            same(family, one, other, f"the state after chunks of {chunks}")


# left, right and in the middle, all seen, and a row without a token
MASKS = [
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
]


def check_a_row_with_hidden_steps_is_what_it_is_alone(family: Family, part: PartFacts) -> None:
    module = build(family, part).eval()
    if not module.reads_mask:
        return
    mask_BT = torch.tensor(MASKS, dtype=torch.bool)
    x_BTD = inputs(part, batch=len(mask_BT)).masked_fill(~mask_BT.unsqueeze(-1), 3.0)  # what is there makes no odds
    given = module(x_BTD, mask=mask_BT)
    y_BTD, state = given if module.stateful else (given, None)
    hidden = module.skip(x_BTD) if module.skip(x_BTD) is not None else torch.zeros_like(y_BTD)
    same(family, y_BTD[~mask_BT], hidden[~mask_BT], "what is added at hidden steps and zeros")
    rows = [x_TD[seen_T].unsqueeze(0) for x_TD, seen_T in zip(x_BTD, mask_BT, strict=True)]
    for row, alone_1TD in enumerate(rows):
        if not alone_1TD.shape[1] or part.input_shape[1] != "time":
            continue
        alone = module(alone_1TD)
        want_1TD, after = alone if module.stateful else (alone, None)
        same(family, y_BTD[row, mask_BT[row]], want_1TD[0], f"row {row} of a padded batch and that row alone")
        if after is not None and state is not None:
            for one, other in zip(tensors(state), tensors(after), strict=True):
                same(family, one[row], other[0], f"the state after row {row} of a padded batch and that row's alone")
    if module.stateful:
        start = module(inputs(part, batch=len(mask_BT), seed=2))[1]
        _, kept = module(x_BTD, start, mask=mask_BT)
        for one, other in zip(tensors(kept), tensors(start), strict=True):
            same(family, one[-1], other[-1], "the state after a row without a token and before it", bound=0)
        pieces: list[torch.Tensor] = []
        carried: State | None = None
        for chunk_BTD, seen_BT in zip(x_BTD.split((1, 4, 7), 1), mask_BT.split((1, 4, 7), 1), strict=True):
            piece_BTD, carried = module(chunk_BTD, carried, mask=seen_BT)
            pieces.append(piece_BTD)
        same(family, torch.cat(pieces, 1), y_BTD, "chunks of a padded batch and the whole")


def check_a_masked_call_has_its_shapes_without_numbers(family: Family, part: PartFacts) -> None:
    """A folder is looked at on the meta device before its weights are read."""
    module = build(family, part).eval()
    if not module.reads_mask:
        return
    x_BTD, mask_BT = inputs(part, batch=len(MASKS)), torch.tensor(MASKS, dtype=torch.bool)
    wanted = module(x_BTD, mask=mask_BT)
    with torch.device("meta"):
        found = module.to("meta")(x_BTD.to("meta"), mask=mask_BT.to("meta"))
    for one, other in zip(*(pytree.tree_leaves(given) for given in (found, wanted)), strict=True):
        expect(one.shape == other.shape, family, f"masked on the meta device: {one.shape}, expected {other.shape}")


def check_only_a_part_that_sees_the_future_gets_a_module_that_does(family: Family, part: PartFacts) -> None:
    if not part.is_sequence or part.mixing == "bidirectional":
        return
    module = build(family, part).eval()
    x_BTD = inputs(part)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 7, 0] += 1  # of all features alike, a norm would take it off
    change_T = (output(module, moved_BTD) - output(module, x_BTD)).abs().amax((0, 2))
    expect(not change_T[:7].any(), family, "a step reads later ones, in a part that does not")
    expect(bool(change_T[7] > 0), family, "a step does not read itself")


def check_a_causal_module_is_to_be_had_for_a_part_that_reads_both_ways(family: Family, part: PartFacts) -> None:
    if "causal" not in family.options.model_fields or not part.is_sequence or part.mixing != "bidirectional":
        return
    module, reference = build(family, part, causal=True), build(family, replace(part, mixing="causal"))
    same_kind = type(module) is type(reference) and module.config() == reference.config()
    expect(same_kind, family, "causal=True gives another module than a causal part does")
    expect(module.stateful == reference.stateful, family, "a causal module carries no state for this part alone")


AHEAD = 3


def looking_ahead(family: Family, part: PartFacts, **options: Any) -> Any:
    """A module that looks `AHEAD` steps ahead; None where the family, or the part, has no such thing."""
    if "lookahead" not in family.options.model_fields or not part.is_sequence or part.mixing != "bidirectional":
        return None
    if not build(family, part, causal=True).looks_ahead:
        try:
            build(family, part, lookahead=AHEAD)
        except (ValueError, TargetMismatchError):
            return None
        expect(False, family, "a look-ahead is taken and not kept: say looks_ahead, or let the frame refuse it")
    return build(family, part, lookahead=AHEAD, **options).eval()


def check_a_look_ahead_reads_so_many_later_steps_and_no_more(family: Family, part: PartFacts) -> None:
    module = looking_ahead(family, part)
    if module is None:
        return
    kind = build(family, part, causal=True)
    expect(module.stateful == kind.stateful, family, "a look-ahead takes the state from a causal module")
    expect(module.lookahead == AHEAD, family, f"a look-ahead of {module.lookahead}, not {AHEAD}")
    x_BTD = inputs(part)
    before_BTD = output(module, x_BTD)
    expect(before_BTD.shape == x_BTD.shape, family, f"{tuple(x_BTD.shape)} becomes {tuple(before_BTD.shape)}")
    for step in (5, 8, 11):
        moved_BTD = x_BTD.clone()
        moved_BTD[:, step, 0] += 1
        change_T = (output(module, moved_BTD) - before_BTD).abs().amax((0, 2))
        first = step - AHEAD
        expect(not change_T[:first].any(), family, f"a change of step {step} moves one before {first}")
        expect(
            bool((change_T[first : step + 1] > 0).all()), family, f"a change of step {step} moves not all from {first}"
        )
    for mixing in ("causal", "none"):
        plain, given = (build(family, replace(part, mixing=mixing), lookahead=n).config() for n in (0, AHEAD))
        expect(plain == given, family, f"a {mixing} part reads no later step, and gets a look-ahead all the same")


def check_a_stream_that_looks_ahead_is_the_whole_so_many_steps_late(family: Family, part: PartFacts) -> None:
    for residual in (False, True):
        module = looking_ahead(family, part, residual=residual, norm=residual)
        if module is None or not module.stateful:
            return
        x_BTD = inputs(part)
        whole_BTD, ended = module(x_BTD)
        zeros = module.initial_state(x_BTD)
        expect(not any(z.any() for z in tensors(zeros)), family, "a stream starts from zeros")
        shapes = [[s.shape for s in tensors(each)] for each in (zeros, ended)]
        expect(shapes[0] == shapes[1], family, f"a state of {shapes[0]} becomes one of {shapes[1]}")
        # two steps before the first token, and as many after the last as it takes: noise, which makes no odds
        noise_BTD = inputs(part, seed=7)[:, : 2 + AHEAD]
        run_BTD = torch.cat([noise_BTD[:, :2], x_BTD, noise_BTD[:, 2:]], 1)
        seen_BT = torch.zeros(run_BTD.shape[:2], dtype=torch.bool)
        seen_BT[:, 2:-AHEAD] = True
        for chunks in ((17,), (1,) * 17, (1, 5, 1, 9, 1), (14, 3)):
            pieces: list[torch.Tensor] = []
            state = zeros
            for chunk_BTD, mask_BT in zip(run_BTD.split(chunks, 1), seen_BT.split(chunks, 1), strict=True):
                y_BTD, state = module(chunk_BTD, state, mask=mask_BT)
                pieces.append(y_BTD)
            same(
                family, torch.cat(pieces, 1)[:, 2 + AHEAD :], whole_BTD, f"a stream in chunks of {chunks} and the whole"
            )
        unmasked_BTD = module(x_BTD, zeros)[0]
        same(family, unmasked_BTD[:, AHEAD:], whole_BTD[:, :-AHEAD], "a stream that has not ended and the whole")


def check_a_padded_row_that_looks_ahead_is_what_it_is_alone(family: Family, part: PartFacts) -> None:
    module = looking_ahead(family, part)
    if module is None or part.input_shape[1] != "time":
        return
    mask_BT = torch.tensor(MASKS, dtype=torch.bool)
    x_BTD = inputs(part, batch=len(mask_BT)).masked_fill(~mask_BT.unsqueeze(-1), 3.0)
    y_BTD, _ = module(x_BTD, mask=mask_BT)
    skipped = module.skip(x_BTD)
    added_BTD = y_BTD if skipped is None else y_BTD - skipped
    expect(not added_BTD[~mask_BT].any(), family, "something is added at hidden steps")
    for row, seen_T in enumerate(mask_BT):
        if seen_T.any():
            alone_1TD, _ = module(x_BTD[row, seen_T].unsqueeze(0))
            same(family, y_BTD[row, seen_T], alone_1TD[0], f"row {row} of a padded batch and that row alone")


def check_the_last_layer_is_solved_in_closed_form(family: Family, part: PartFacts) -> None:
    """What another last layer would give is found again: features, shape, unshape and skip belong together."""
    module = build(family, part).eval()
    if not hasattr(module, "last"):
        return
    if getattr(module, "final_relu", False):
        return  # solved before it is rectified
    x = torch.cat([inputs(part, batch=32, seed=seed) for seed in range(8)])  # more than features, also of three in four
    wanted = build(family, part).eval()
    wanted.load_state_dict(module.state_dict())
    with torch.no_grad():
        nn.init.normal_(wanted.last.weight, std=wanted.last.in_features**-0.5)
        y = output(wanted, x)
        expect(relative_error(output(module, x), y) > 1e-2, family, "another last layer gives the same")
    solve_alone(module, [(x, y)], ridge=1e-9, where=part.path)
    with torch.no_grad():
        error = relative_error(output(module, x), y)
    expect(error < 1e-3, family, f"solved in closed form, the output is off by {error:.1e}")


@torch.no_grad()
def mixes(module: TargetModule, x: torch.Tensor) -> bool:
    """Whether a step's output changes with another step's input."""
    moved = x.clone()
    moved[:, 5, 0] += 1
    change_BTD = (output(module, moved) - output(module, x)).abs()
    return bool(change_BTD[:, :5].any() or change_BTD[:, 6:].any())


def toy(part: PartFacts, x: torch.Tensor, mixed: bool) -> torch.Tensor:
    """What a part could compute: a running mean or the whole mean where steps are mixed, else each token, pixel or
    vector by itself.
    """
    generator = torch.Generator().manual_seed(5)
    if len(part.input_shape) == 4:
        channels = int(part.output_shape[1]), int(part.input_shape[1])
        mix_OC = torch.randn(channels, generator=generator) * channels[1] ** -0.5
        pooled = F.adaptive_avg_pool2d(x, (int(part.output_shape[2]), int(part.output_shape[3])))
        wanted = torch.einsum("oc,bchw->bohw", mix_OC, pooled)
        return wanted.relu() if part.nonnegative else wanted
    mix_OD = torch.randn(part.width_out, part.width_in, generator=generator) * part.width_in**-0.5
    if mixed:
        steps_T1 = torch.arange(1, x.shape[1] + 1).view(-1, 1)
        x = x.cumsum(1) / steps_T1 if part.mixing == "causal" else x.mean(1, keepdim=True).expand_as(x)
    return x @ mix_OD.T


def check_the_loss_falls_on_a_toy_part(family: Family, part: PartFacts) -> None:
    module = build(family, part).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        return
    x = inputs(part, batch=16)
    with torch.no_grad():
        wanted = toy(part, x, mixed=part.is_sequence and part.mixing != "none" and mixes(module, x))
    variance = wanted.var().item()  # what a constant leaves
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses: list[float] = []
    while len(losses) < 60 and not (losses and losses[-1] < 0.25 * min(losses[0], variance)):  # no doubt is left
        loss = (output(module, x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    reached = f"from {losses[0]:.3f} to {losses[-1]:.3f}, where a constant leaves {variance:.3f}"
    expect(losses[-1] < 0.5 * min(losses[0], variance), family, f"{len(losses)} steps bring the loss {reached}")
    for name, parameter in module.named_parameters():
        sane = parameter.grad is None or bool(parameter.grad.isfinite().all())
        expect(sane, family, f"the gradient of {name} holds NaN or infinities")
        expect(not parameter.requires_grad or parameter.grad is not None, family, f"{name} has no gradient")


def check_it_computes_in_other_dtypes(family: Family, part: PartFacts) -> None:
    module = build(family, part).eval()
    x = inputs(part)
    with torch.no_grad():
        exact = output(module.double(), x.double())
        expect(exact.dtype == torch.float64, family, f"float64 in, {exact.dtype} out")
        single = output(module.float(), x)
        error = relative_error(single, exact) if exact.any() else 0.0
        expect(error < VALUE[torch.float32], family, f"float32 is off by {error:.1e}")
        half = output(module.bfloat16(), x.bfloat16())
        expect(half.dtype == torch.bfloat16, family, f"bfloat16 in, {half.dtype} out")
        expect(bool(half.isfinite().all()), family, "NaN or infinities in bfloat16")


def check_copying_the_guides_weights_names_them(family: Family, part: PartFacts) -> None:
    module = build(family, part)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    copied = module.copy_from(part)
    expect(isinstance(copied, tuple) and all(isinstance(n, str) for n in copied), family, f"copy_from gave {copied!r}")
    changed = any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    expect(changed == bool(copied), family, f"copy_from says {copied!r}, and the weights {'differ' * changed}")


CHECKS: tuple[Callable[[Family, PartFacts], None], ...] = (
    check_it_describes_itself,
    check_a_part_that_it_does_not_take_is_refused_by_path_and_target,
    check_the_output_has_the_parts_shape,
    check_silence_is_a_number,
    check_the_meta_device_builds_the_same_shapes,
    check_a_module_is_rebuilt_from_its_json_config,
    check_steps_in_chunks_equal_all_steps_at_once,
    check_a_row_with_hidden_steps_is_what_it_is_alone,
    check_a_masked_call_has_its_shapes_without_numbers,
    check_only_a_part_that_sees_the_future_gets_a_module_that_does,
    check_a_causal_module_is_to_be_had_for_a_part_that_reads_both_ways,
    check_a_look_ahead_reads_so_many_later_steps_and_no_more,
    check_a_stream_that_looks_ahead_is_the_whole_so_many_steps_late,
    check_a_padded_row_that_looks_ahead_is_what_it_is_alone,
    check_the_last_layer_is_solved_in_closed_form,
    check_the_loss_falls_on_a_toy_part,
    check_it_computes_in_other_dtypes,
    check_copying_the_guides_weights_names_them,
)


def check_onnx(family: Family, part: PartFacts, folder: Path) -> None:
    """A file of the module alone: the export itself compares it in onnxruntime, at several sizes, and in chunks where
    it carries a state.
    """
    from thesean.deploy.export import export

    module = build(family, part).eval()
    graph = fx.Graph()
    y = graph.call_module("part", (graph.placeholder("x"),))
    graph.output(graph.call_function(lambda pair: pair[0], (y,)) if module.stateful else y)
    graph_module = fx.GraphModule(nn.ModuleDict({"part": module}), graph).eval()
    signature = Signature(inputs=(InputSpec(name="x", dtype=torch.float32, shape=part.input_shape),))
    report = export(graph_module, signature, folder / f"{family.name}.onnx", stateful=module.stateful)
    expect(report.stateful == module.stateful, family, f"carries a state in torch: {module.stateful}, in the file: not")
    worst = max(check.max_abs_error for check in report.checks)
    expect(not math.isnan(worst) and worst < 1e-5, family, f"onnxruntime is off by {worst:.1e}")


def check_family(family: Family, part: PartFacts, folder: Path | None = None) -> None:
    """All that a target promises, on a part that it takes; with a folder for files, in onnxruntime too."""
    for check in CHECKS:
        check(family, part)
    if folder is not None:
        check_onnx(family, part, folder)
