"""B batch, T time, D width, E hidden neurons"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import captured, models
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.mlp import _stored, find_mlp
from thesean.passes.analyse.regions import Region
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.graph.record import record
from thesean.passes.plan.partition import partition
from thesean.targets.shared.facts import Affine, MLPFacts


def recorded(guide: Captured) -> dict[Any, Any]:
    return record(guide.graph_module, guide.signature.random_inputs(probe_sizes(guide)))


def branch(guide: Captured, index: int) -> Region:
    return partition(captured.flow_of(guide), "sublayer")[index].region


def mlp_of(guide: Captured, index: int) -> MLPFacts:
    facts = find_mlp(branch(guide, index), recorded(guide))
    assert facts is not None
    return facts


def equal(affine: Affine | None, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
    assert affine is not None
    torch.testing.assert_close(affine.weight_OI, weight_OI, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(affine.bias_O, torch.zeros(len(weight_OI)) if bias_O is None else bias_O)


def test_transposed_weights_and_a_written_out_gelu_of_gpt2_are_read_off():
    facts = mlp_of(captured.gpt2(), 3)
    mlp = models.gpt2().transformer.h[1].mlp
    equal(facts.up, mlp.c_fc.weight.T, mlp.c_fc.bias)
    equal(facts.down, mlp.c_proj.weight.T, mlp.c_proj.bias)
    assert (facts.activation, facts.gate, facts.width) == ("gelu_tanh", None, 64)


def test_a_gated_mlp_of_llama_is_read_off():
    facts = mlp_of(captured.llama(), 1)
    mlp = models.llama().model.layers[0].mlp
    equal(facts.up, mlp.up_proj.weight)
    equal(facts.gate, mlp.gate_proj.weight)
    equal(facts.down, mlp.down_proj.weight)
    assert facts.activation == "silu"


def test_the_mlp_of_bert_ends_before_its_norm():
    facts = mlp_of(captured.bert(), 1)
    layer = models.bert().encoder.layer[0]
    equal(facts.up, layer.intermediate.dense.weight, layer.intermediate.dense.bias)
    equal(facts.down, layer.output.dense.weight, layer.output.dense.bias)
    assert facts.activation == "gelu"


def test_the_mlp_of_torch_is_read_off():
    facts = mlp_of(captured.encoder(), 1)
    layer = models.encoder().encoder.layers[0]
    equal(facts.up, layer.linear1.weight, layer.linear1.bias)
    equal(facts.down, layer.linear2.weight, layer.linear2.bias)
    assert facts.activation == "relu"


def test_the_mlp_of_a_vision_transformer_is_read_off():
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=12, patch_size=4, **sizes), add_pooling_layer=False).eval()
    facts = mlp_of(capture(model, models.vectors(2, 3, 12, 12)), 1)
    ups = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 24]
    equal(facts.up, ups[0].weight, ups[0].bias)
    assert facts.activation == "gelu"


def test_matrices_that_are_no_modules_are_read_off_vectors_too():
    facts = mlp_of(captured.functional(), 0)
    model = models.functional()
    equal(facts.up, model.up[0].T)
    equal(facts.down, model.down[0].T)
    assert facts.activation == "tanh"


class Branches(nn.Module):
    """x + branch(x), twice, with a head: `build` makes a branch."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(build() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


class Written(nn.Module):
    """down(f(up(x))), with f as written."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], into: int = 8, width: int = 20) -> None:
        super().__init__()
        self.up, self.down, self.f = nn.Linear(into, width), nn.Linear(width, into), f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.f(self.up(x)))


class Gated(nn.Module):
    """down(f(gate(x)) * up(x)) from one packed matrix, split, interleaved, or with gate and up the other way round."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], order: str, width: int = 20) -> None:
        super().__init__()
        self.both, self.down, self.f, self.order = nn.Linear(8, 2 * width), nn.Linear(width, 8), f, order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.both(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.order == "interleaved" else both.chunk(2, -1)
        return self.down(up * self.f(gate) if self.order == "split" else self.f(gate) * up)


class Chain(nn.Module):
    """Modules in a row, after any function of their input."""

    def __init__(self, *layers: nn.Module, before: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.layers, self.before = nn.Sequential(*layers), before or (lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.before(x))


def written(build: Callable[[], nn.Module], x: torch.Tensor | None = None) -> tuple[nn.Module, MLPFacts | None]:
    """The first of two such branches, and what is found in it; the region holds all of the branch."""
    torch.manual_seed(0)
    model = Branches(build).eval()
    guide = capture(model, models.vectors(2, 6, 8) if x is None else x)
    flow = data_flow(guide.graph_module.graph)
    (first, *_) = (s for s in partition(flow) if s.region.is_heavy())
    (end,) = (n for n in first.region.exit.all_input_nodes if n in first.region.nodes)
    nodes = tuple(n for n in first.region.nodes if n is not first.region.exit)
    region = Region(entry=first.region.entry, exit=end, nodes=nodes)
    return model.branches[0], find_mlp(region, recorded(guide))


def reproduces(branch: nn.Module, facts: MLPFacts | None) -> None:
    assert facts is not None
    x = models.vectors(3, 5, 8, seed=7)
    torch.testing.assert_close(F.linear(facts.hidden(x), *facts.down), branch(x), rtol=1e-4, atol=1e-5)


WRITTEN: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "module": ("gelu", F.gelu),
    "by parts": ("gelu", lambda x: x / 2 * (1 + torch.erf(x / 2**0.5))),
    "cubic": ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    "sigmoid": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "square": ("squared_relu", lambda x: F.relu(x) * F.relu(x)),
    "clamp": ("relu6", lambda x: x.clamp(0, 6)),
    "maximum": ("leaky_relu", lambda x: torch.maximum(x, 0.01 * x)),
    "exponential": ("elu", lambda x: x.clamp(min=0) + torch.expm1(x.clamp(max=0))),
    "half a logistic": ("silu", lambda x: 0.5 * x * (1 + torch.tanh(x / 2))),
    "softplus": ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    "reshaped": ("tanh", lambda x: x.view(-1, x.shape[-1]).tanh().view(x.shape)),
}


@pytest.mark.parametrize("spelling", WRITTEN)
def test_an_activation_is_known_however_it_is_written(spelling):
    name, f = WRITTEN[spelling]
    branch, facts = written(lambda: Written(f))
    reproduces(branch, facts)
    assert facts.activation == name
    assert facts.gate is None


def test_as_many_neurons_as_inputs_do_not_confuse_the_maps():
    branch, facts = written(lambda: Written(WRITTEN["cubic"][1], width=8))
    reproduces(branch, facts)
    assert isinstance(branch, Written)
    equal(facts.up, branch.up.weight, branch.up.bias)


@pytest.mark.thorough
@pytest.mark.parametrize("order", ["chunked", "split", "interleaved"])
@pytest.mark.parametrize(
    ("name", "f"), [("gelu", F.gelu), ("gelu_tanh", WRITTEN["cubic"][1]), ("sigmoid", torch.sigmoid)]
)
def test_a_gate_is_told_from_what_it_gates(name, f, order):
    branch, facts = written(lambda: Gated(f, order))
    reproduces(branch, facts)
    assert facts.activation == name
    gate = branch.both.weight[::2] if order == "interleaved" else branch.both.weight[:20]
    equal(facts.gate, gate, branch.both.bias[::2] if order == "interleaved" else branch.both.bias[:20])


def test_a_gate_without_an_activation_is_bilinear():
    branch, facts = written(lambda: Gated(lambda x: x, "chunked"))
    reproduces(branch, facts)
    assert facts.activation == "identity"


def test_weights_are_the_guides_own_and_not_copied():
    guide = captured.gpt2()
    facts = mlp_of(guide, 1)
    own = {p.data_ptr() for p in guide.graph_module.parameters()}
    assert {facts.up.weight_OI.data_ptr(), facts.down.weight_OI.data_ptr()} <= own
    assert not facts.up.weight_OI.requires_grad


def test_maps_of_several_matrices_and_factors_are_multiplied_out():
    def build() -> nn.Module:
        low, high = nn.Linear(8, 3, bias=False), nn.Linear(3, 20)
        return Chain(low, high, nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 8), before=lambda x: 0.5 * x)

    branch, facts = written(build)
    reproduces(branch, facts)
    layers = branch.layers
    equal(facts.up, 0.5 * layers[1].weight @ layers[0].weight, layers[1].bias)


@pytest.mark.parametrize("shape", [(3, 8), (2, 6, 8), (2, 3, 4, 8)])
def test_any_dimensions_before_the_last_are_tokens(shape):
    branch, facts = written(lambda: Written(F.gelu), models.vectors(*shape))
    reproduces(branch, facts)


class Cumulative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Written(F.relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x).cumsum(1)


NOT_ONE: dict[str, Callable[[], nn.Module]] = {
    "a norm in front": lambda: Chain(nn.LayerNorm(8), Written(F.gelu)),
    "a norm behind": lambda: Chain(Written(F.gelu), nn.LayerNorm(8)),
    "a norm inside": lambda: Chain(nn.Linear(8, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 8)),
    "no activation": lambda: Chain(nn.Linear(8, 20), nn.Linear(20, 8)),
    "an activation last": lambda: Chain(nn.Linear(8, 20), nn.Linear(20, 8), nn.ReLU()),
    "two hidden layers": lambda: Chain(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 8)),
    "an activation per neuron": lambda: Written(lambda x: torch.maximum(x, torch.linspace(0.1, 0.9, 20) * x)),
    "an unknown activation": lambda: Written(torch.sin),
    "a softmax": lambda: Written(lambda x: x.softmax(-1)),
    "a residual inside": lambda: Chain(Branches(lambda: Written(F.relu)).branches[0], nn.Tanh()),
    "tokens that mix": Cumulative,
    "a skip around": lambda: Skip(),
}


class Skip(nn.Module):
    """The hidden value is not all that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.beside = Written(F.relu), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) + self.beside(x)


@pytest.mark.thorough
@pytest.mark.parametrize("what", NOT_ONE)
def test_what_is_no_mlp_is_none(what):
    _, facts = written(NOT_ONE[what])
    assert facts is None


@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert, captured.llama, captured.encoder])
def test_neither_attention_nor_a_whole_block_is_an_mlp(guide):
    values = recorded(guide())
    assert find_mlp(branch(guide(), 0), values) is None
    for part in partition(captured.flow_of(guide())):
        assert find_mlp(part.region, values) is None


@pytest.mark.parametrize("guide", [captured.resnet, captured.convnet, captured.mlp])
def test_regions_of_other_networks_have_none(guide):
    values = recorded(guide())
    assert [find_mlp(p.region, values) for p in partition(captured.flow_of(guide()))].count(None) > 0


class PiecewiseMLP(nn.Module):
    """down(act(up(x))) with an activation that asks where x is positive: two quadratics, as xIELU is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return x + self.down(torch.where(up > 0, up * up + 0.5 * up, torch.expm1(up.clamp_max(0)) - up))


def test_an_activation_that_compares_is_none_that_is_known():
    guide = capture(models.seeded(PiecewiseMLP), models.vectors(2, 6, 8))
    part = partition(captured.flow_of(guide), "sublayer")[0]
    assert find_mlp(part.region, captured.recorded(guide)) is None


def test_facts_are_in_the_precision_of_the_region():
    facts = mlp_of(captured.llama(), 1)
    region: Any = SimpleNamespace(entry=SimpleNamespace(meta={"val": torch.empty(1, dtype=torch.bfloat16)}))
    stored = _stored(facts, region)
    assert stored.gate is not None
    for weight, bias in (stored.up, stored.gate, stored.down):
        assert weight.dtype == bias.dtype == torch.bfloat16
