"""The contract on every family that there is and every kind of part that it takes, and on modules that break it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.targets import contract
from tests.targets.contract import (
    CHECKS,
    PARTS,
    SIZES,
    build,
    check_family,
    check_onnx,
    fits,
    inputs,
    output,
    recurrent_families,
    sequence,
)
from thesean.errors import TargetMismatchError
from thesean.targets import Family, Options, PartFacts, TargetModule, get_family, rebuild, targets
from thesean.targets.shared.sequence import check_sequence

CASES = [(name, kind) for name in targets() for kind, part in PARTS.items() if fits(get_family(name), part)]
# one part of each family that carries no state: the others are exported in tests/deploy/lowering
EXPORTED = {name: kind for name, kind in reversed(CASES) if name not in recurrent_families()}


# while one works, one part of each family
FIRST = dict(reversed(CASES))
MARKED = [c if FIRST[c[0]] == c[1] else pytest.param(*c, marks=pytest.mark.thorough) for c in CASES]


@pytest.mark.parametrize(("name", "kind"), MARKED)
def test_a_family_keeps_its_promises_on_every_part_that_it_takes(name, kind):
    check_family(get_family(name), PARTS[kind])


# Where torch counts nothing, in a fused operator, and where it multiplies zeros too, in a chunk, a window or a memory
# that is not filled yet: what is said of what it counts, at least.
UNCOUNTED = {"lstm"}
PADDED = {"bounded-attention": 0.15, "delta": 0.6, "linear-attention": 0.6, "parallel-block": 0.8, "sliding": 0.6}
PADDED |= {"ssm": 0.9}


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Of fused attention on a CPU, which torch's table lacks; it is given shapes."""
    return 2 * query.numel() * key[-2] + 2 * query[:-1].numel() * value[-2:].numel()


@pytest.mark.parametrize(("name", "kind"), MARKED)
def test_flops_are_those_that_torch_counts(name, kind):
    part, family = PARTS[kind], get_family(name)
    module = build(family, part).eval()
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
        output(module, inputs(part, SIZES["batch"], SIZES["time"]))
    said, counted = module.flops(part, SIZES), counter.get_total_flops()
    if module.family in PADDED:
        assert PADDED[module.family] * counted < said < counted
    elif module.family not in UNCOUNTED:
        assert said == counted


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_module_is_found_again_under_the_name_that_it_is_saved_with(name, kind):
    module = build(get_family(name), PARTS[kind])
    assert type(rebuild(module.family, module.config())) is type(module)


def test_every_family_takes_one_of_the_parts():
    # "copy" has no module: it keeps the guide's own
    assert {name for name, _ in CASES} == set(targets()) - {"copy"}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(("name", "kind"), EXPORTED.items())
def test_a_family_without_a_state_is_exported(name, kind, tmp_path):
    pytest.importorskip("onnxscript")
    check_onnx(get_family(name), PARTS[kind], tmp_path)


def test_recurrent_families_are_those_that_carry_a_state():
    assert {"elman", "gru", "lstm", "mingru", "rnn", "conv"} <= set(recurrent_families())
    assert not {"mlp", "mixer", "linear", "resnet-block", "identity"} & set(recurrent_families())


def test_every_check_of_the_module_is_run():
    written = {f for name, f in vars(contract).items() if name.startswith("check_")}
    assert written - {check_family, check_onnx} == set(CHECKS)


class Scaled(TargetModule):
    """y = last(x), and what a subclass breaks."""

    family = "scaled"

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.width = width
        self.last = nn.Linear(width, width)

    def config(self) -> dict[str, Any]:
        return {"width": self.width}

    def features(self, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        return x, None


class Wider(Scaled):
    def shape(self, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([y, y], -1)


class Forgetful(Scaled):
    def config(self) -> dict[str, Any]:
        return {"width": self.width, "seed": 0}


class ReadsValues(Scaled):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.scale = float(torch.ones(1))


class Backwards(Scaled):
    def features(self, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        return x.flip(1), None


class Stateless(Scaled):
    """Claims to carry a state, and starts anew with every chunk."""

    stateful = True

    def features(self, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        return x.cumsum(1), x[:, -1]

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x[:, 0])


class HiddenSkip(Scaled):
    def forward(self, x: torch.Tensor, state: Any = None) -> Any:
        return super().forward(x) + x.square()


class Frozen(Scaled):
    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.unread = nn.Parameter(torch.ones(1))


class Untold(Scaled):
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        nn.init.zeros_(self.last.weight)
        return ()


def family(module: type[Scaled], **changes: Any) -> Family:
    made = Family(
        name="scaled",
        summary="one linear layer",
        options=Options,
        module=module,
        build=lambda part, options: module(width=part.width_in),
        check=lambda part, options: check_sequence("scaled", part),
    )
    return dataclasses.replace(made, **changes)


def test_a_family_of_ones_own_passes():
    check_family(family(Scaled), sequence("none"))


@pytest.mark.parametrize(
    ("module", "mixing", "found"),
    [
        (Wider, "none", "the output is"),
        (Forgetful, "none", "unexpected keyword argument 'seed'"),
        (ReadsValues, "none", "meta"),
        (Backwards, "causal", "a step reads later ones"),
        (Stateless, "causal", "chunks of .* and the whole"),
        (HiddenSkip, "none", "solved in closed form, the output is off by"),
        (Frozen, "none", "unread has no gradient"),
        (Untold, "none", "copy_from says"),
    ],
)
def test_what_a_module_breaks_is_found(module, mixing, found):
    with pytest.raises((AssertionError, TypeError, RuntimeError), match=found):
        check_family(family(module), sequence(mixing))


def refuse(part: PartFacts, options: Options) -> None:
    if not part.is_sequence or part.input_shape != ("batch", "time", 16):
        raise TargetMismatchError("not this one")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (dict(name="Scaled"), "expected a name in lower case"),
        (dict(summary="one\ntwo"), "expected a summary of one line"),
        (dict(check=lambda part, options: None), "invalid literal"),
        (dict(check=refuse), "a refusal names part, found, expected"),
    ],
)
def test_what_a_family_says_wrongly_is_found(changes, found):
    with pytest.raises((AssertionError, ValueError), match=found):
        check_family(family(Scaled, **changes), sequence("none"))
