"""B batch, T time, D width, W neurons of the guide, E neurons kept"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.targets.build import build, started
from tests.tolerances import VALUE, relative_error
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import Affine, PartFacts, rebuild
from thesean.targets.shared.activations import ACTIVATIONS
from thesean.targets.shared.facts import MLPFacts


def mlp_facts(width=16, neurons=24, width_out=16, activation="gelu", gated=False, seed=0) -> MLPFacts:
    generator = torch.Generator().manual_seed(seed)

    def affine(out: int, into: int) -> Affine:
        scale = into**-0.5
        weight, bias = torch.randn(out, into, generator=generator), torch.randn(out, generator=generator)
        return Affine(scale * weight, 0.1 * bias)

    gate = affine(neurons, width) if gated else None
    return MLPFacts(up=affine(neurons, width), down=affine(width_out, neurons), activation=activation, gate=gate)


def part_of(facts: MLPFacts | None, shape=("batch", "time")) -> PartFacts:
    width, width_out = (16, 16) if facts is None else (facts.up.weight_OI.shape[1], facts.down.weight_OI.shape[0])
    return PartFacts(
        path="layers.0.mlp",
        input_shape=(*shape, width),
        output_shape=(*shape, width_out),
        mixing="none",
        params=1000,
        mlp=facts,
    )


def guide_of(facts: MLPFacts, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(facts.hidden(x), *facts.down)


def examples_of(facts: MLPFacts, count=4, seed=1, tokens=64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs as a trained network has them: a few directions hold most of their variance."""
    generator = torch.Generator().manual_seed(seed)
    width = facts.up.weight_OI.shape[1]
    scale = torch.logspace(0.5, -1, width)
    inputs = [scale * torch.randn(2, tokens // 2, width, generator=generator) for _ in range(count)]
    return [(x, guide_of(facts, x)) for x in inputs]


def error_of(module, facts: MLPFacts) -> float:
    x = torch.cat([x for x, _ in examples_of(facts, seed=9)])
    return relative_error(module(x), guide_of(facts, x))


def narrowed(facts: MLPFacts, data=True, **options):
    return started("narrow", part_of(facts), examples_of(facts) if data else (), **options)


def duplicated(facts: MLPFacts, gain: float) -> MLPFacts:
    """Every neuron twice, the second `gain` times as strong on the way out: the first alone can say it all."""
    up = Affine(torch.cat([facts.up.weight_OI] * 2), torch.cat([facts.up.bias_O] * 2))
    gate = facts.gate and Affine(torch.cat([facts.gate.weight_OI] * 2), torch.cat([facts.gate.bias_O] * 2))
    down = Affine(torch.cat([facts.down.weight_OI, gain * facts.down.weight_OI], 1), facts.down.bias_O)
    return MLPFacts(up=up, down=down, activation=facts.activation, gate=gate)


ALL = pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("squared_relu", False), ("silu", True)])


@ALL
def test_all_neurons_are_the_guides_mlp(activation, gated):
    facts = mlp_facts(activation=activation, gated=gated)
    for data in (False, True):
        assert error_of(narrowed(facts, data, ratio=1), facts) < VALUE[torch.float32]


@ALL
def test_half_of_doubled_neurons_lose_nothing(activation, gated):
    facts = duplicated(mlp_facts(activation=activation, gated=gated), gain=-3.0)
    module = narrowed(facts, ratio=0.5)
    assert module.config()["width"] == 24
    assert error_of(module, facts) < VALUE[torch.float32]
    # the neurons kept are one of each pair, whichever
    ups = {tuple(row) for row in facts.up.weight_OI.tolist()}
    assert {tuple(row) for row in module.up.weight.tolist()} == ups


def test_a_neuron_by_hand():
    """h = relu(x), relu(-x), relu(x) with y = h_0 - h_1 + h_2: two neurons give 2 relu(x) - relu(-x)."""
    facts = MLPFacts(
        up=Affine(torch.tensor([[1.0], [-1.0], [1.0]]), torch.zeros(3)),
        down=Affine(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([0.5])),
        activation="relu",
    )
    module = narrowed(facts, width=2)
    assert sorted(module.up.weight.flatten().tolist()) == [-1.0, 1.0]
    x = torch.tensor([[[2.0], [-3.0]]])
    torch.testing.assert_close(module(x), torch.tensor([[[4.5], [-2.5]]]), rtol=1e-4, atol=1e-5)


def test_without_data_the_heaviest_neurons_are_copied_as_they_are():
    facts = mlp_facts()
    facts.down.weight_OI[:, ::3] *= 100
    module = narrowed(facts, data=False, width=8)
    assert torch.equal(module.up.weight, facts.up.weight_OI[::3])
    assert torch.equal(module.last.weight, facts.down.weight_OI[:, ::3])
    assert torch.equal(module.last.bias, facts.down.bias_O)


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_copied_leaves_the_last_layer_to_be_solved(gated):
    facts = mlp_facts(gated=gated)
    part = part_of(facts)
    copied = build("narrow", part).copy_from(part)
    assert copied == (("up", "gate", "down") if gated else ("up", "down"))
    assert "output" not in copied


@ALL
def test_data_beats_weight_norms(activation, gated):
    facts = mlp_facts(neurons=48, activation=activation, gated=gated)
    assert error_of(narrowed(facts), facts) < 0.7 * error_of(narrowed(facts, data=False), facts)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), activation=st.sampled_from(["gelu", "relu", "silu", "tanh"]), gated=st.booleans())
def test_more_neurons_lose_less_and_all_of_them_nothing(seed, activation, gated):
    facts = mlp_facts(width=6, neurons=12, width_out=5, activation=activation, gated=gated, seed=seed)
    errors = [error_of(narrowed(facts, width=k), facts) for k in (2, 6, 10, 12)]
    assert errors[-1] < VALUE[torch.float32]
    # on fresh inputs, so up to the noise of 256 examples
    assert all(more <= 1.1 * fewer for fewer, more in itertools.pairwise(errors))


def test_tokens_past_the_limit_are_sampled_from_every_batch():
    """96 tokens are enough for 24 neurons; of these 16 batches only the last sees anything but zero."""
    facts = mlp_facts()
    part = part_of(facts)
    silent = [(torch.zeros(2, 32, 16), torch.zeros(2, 32, 16))] * 15
    module = build("narrow", part)
    module.copy_from(part)
    module.prepare(part, [*silent, *examples_of(facts, 1, tokens=640)])
    assert error_of(module, facts) < error_of(narrowed(facts, False), facts)


def test_not_a_number_in_the_data_names_the_part():
    facts = mlp_facts()
    part = part_of(facts)
    module = build("narrow", part)
    x = torch.full((1, 4, 16), float("nan"))
    with pytest.raises(NumericalError, match=r"^layers.0.mlp: can't choose neurons, activations are not finite"):
        module.prepare(part, [(x, x)])


@pytest.mark.parametrize("shape", [("batch",), ("batch", "time"), ("batch", 5, 6)])
def test_any_dimensions_before_the_last_are_tokens(shape):
    facts = mlp_facts(width_out=7)
    part = part_of(facts, shape)
    module = build("narrow", part, ratio=1)
    module.copy_from(part)
    x = torch.randn(*[3 if isinstance(d, str) else d for d in shape], 16)
    torch.testing.assert_close(module(x), guide_of(facts, x), rtol=1e-4, atol=1e-5)
    tokens = x.shape[:-1].numel()
    assert module.flops(part, {"batch": 3, "time": 3}) == 2 * tokens * (16 * 24 + 24 * 7)


@ALL
def test_the_config_round_trips(activation, gated):
    module = narrowed(mlp_facts(activation=activation, gated=gated))
    again = rebuild("narrow", json.loads(json.dumps(module.config()))).eval()
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
    assert not module.stateful


def test_gradients_reach_every_weight():
    module = narrowed(mlp_facts(gated=True, activation="silu"))
    module(torch.randn(2, 5, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_gradients_are_right():
    module = narrowed(mlp_facts(width=4, neurons=6, width_out=3, gated=True, activation="silu")).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize(
    ("options", "width"), [({}, 12), ({"ratio": 0.25}, 6), ({"width": 5}, 5), ({"ratio": 0.01}, 1)]
)
def test_the_width_is_asked_for_or_half_the_guides(options, width):
    assert build("narrow", part_of(mlp_facts()), **options).config()["width"] == width


def test_another_mlp_than_the_modules_copies_nothing():
    module = build("narrow", part_of(mlp_facts()))
    for other in (mlp_facts(activation="relu"), mlp_facts(gated=True), mlp_facts(neurons=8), mlp_facts(width_out=4)):
        assert module.copy_from(part_of(other)) == ()
    assert module.copy_from(part_of(None)) == ()


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        (None, {}, r"layers.0.mlp: target 'narrow' expected an MLP, .* found \(batch, time, 16\) -> .* is neither"),
        (mlp_facts(), {"width": 25}, r"found width 25\. Lower width"),
        (mlp_facts(), {"heads": 2}, r"found an MLP of 24 neurons, and the option 'heads'"),
        (mlp_facts(), {"ratio": 1.5}, r"option 'ratio'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(facts, options, message):
    with pytest.raises(TargetMismatchError, match=message):
        build("narrow", part_of(facts), **options)


def test_what_is_no_mlp_is_told_what_else_there_is():
    pixels, whole = ("batch", 16, 4), ("batch", "time")
    for part, advice in (
        (part_of(None, pixels), "For fewer channels choose target 'bottleneck' or"),
        (part_of(None, whole), r"Choose target 'mlp' for it alone by parts=\['layers\.0\.mlp'\], name the MLPs"),
        (replace(part_of(None, whole), mixing="causal"), r"Choose target 'mlp' or 'rnn' for it, or keep it with keep="),
    ):
        with pytest.raises(TargetMismatchError, match=f"that is neither.*{advice}"):
            build("narrow", part)


def test_without_data_a_gate_counts_as_much_as_what_it_gates():
    """Neuron 0 is closed, 1 is open: 10 * 10 * 0.01 < 2 * 2 * 2, and 0 would be first by all but the gate."""
    facts = mlp_facts(neurons=2, gated=True)
    assert facts.gate is not None
    for affine, sizes, dim in ((facts.up, (10, 2), 1), (facts.gate, (0.01, 2), 1), (facts.down, (10, 2), 0)):
        norms = affine.weight_OI.norm(dim=dim, keepdim=True)
        affine.weight_OI.mul_(torch.tensor(sizes).view_as(norms) / norms)
    module = build("narrow", part_of(facts), width=1)
    module.copy_from(part_of(facts))
    for linear, affine in ((module.up, facts.up), (module.gate, facts.gate)):
        assert torch.equal(linear.weight, affine.weight_OI[1:])
        assert torch.equal(linear.bias, affine.bias_O[1:])


def test_an_unknown_activation_is_refused():
    config = build("narrow", part_of(mlp_facts())).config()
    with pytest.raises(ValueError, match="unknown activation 'gelo'; known: identity, gelu"):
        type(build("narrow", part_of(mlp_facts())))(**{**config, "activation": "gelo"})
    assert "gelo" not in ACTIVATIONS
