"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.models import vectors
from thesean.passes.analyse.cost import SymbolicSizes, count_params, flops_by_node, remaining_params
from thesean.passes.capture.capture import capture
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition


def flops(guide, **sizes):
    return sum(flops_by_node(guide.graph_module, guide.signature, sizes).values())


def test_parameters_of_a_block_are_those_of_its_module():
    guide, model = captured.gpt2(), models.gpt2()
    for part in partition(captured.flow_of(guide)):
        module = model.get_submodule(part.path)
        assert count_params(guide.graph_module, part.region.nodes) == sum(p.numel() for p in module.parameters())


def test_a_shared_weight_counts_once():
    guide = captured.tied()
    everything = [n for part in partition(captured.flow_of(guide)) for n in part.region.nodes]
    assert count_params(guide.graph_module, everything) == 8 * 8 + 3 * 8


def test_flops_of_a_plain_network_are_two_a_weight():
    assert flops(captured.mlp(), batch=7) == 2 * 7 * (3 * 8 * 8 + 8 * 5)


def test_flops_of_a_convolution_are_two_a_weight_and_pixel():
    guide = captured.convnet()
    weights = 4 * 1 * 9 + 2 * 4 * 4 * 9
    assert flops(guide, batch=3) == 2 * 3 * (36 * weights + 4 * 36 * 5)


def test_flops_of_gpt2_are_those_worked_by_hand():
    batch, time, width = 2, 6, 16
    linear = 12 * width * width  # q, k, v, output and both of the MLP
    attention = 2 * time * width  # q k' and w v, heads together, for each token
    head = models.VOCABULARY * width
    expected = 2 * batch * time * (2 * (linear + attention) + head)
    for kernel in ("sdpa", "eager"):
        assert flops(captured.gpt2(attention=kernel), batch=batch, time=time) == expected


def test_flops_are_counted_without_computing():
    guide = captured.gpt2()
    assert flops(guide, batch=10_000, time=64) > 1e10


def test_flops_of_a_cell_are_two_a_weight_and_token():
    model = torch.nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
    guide = capture(First(model), models.vectors(2, 5, 4))
    weights = 2 * 4 * 6 * (4 + 6) + 2 * 4 * 6 * (12 + 6)
    assert flops(guide, batch=3, time=7) == 2 * 3 * 7 * weights


class First(torch.nn.Module):
    def __init__(self, cell: torch.nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert, captured.encoder, captured.resnet, captured.llama])
def test_flops_read_off_shapes_are_those_that_a_run_on_fake_tensors_counts(guide):
    found = guide()
    sizes = {s: 3 if s.startswith("batch") else 7 for s in found.signature.symbols}
    read = flops_by_node(found.graph_module, found.signature, sizes)
    blind = clone(found.graph_module)
    for node in blind.graph.nodes:
        if node.op == "call_function":
            node.meta.pop("val")
    run = flops_by_node(blind, found.signature, sizes)
    assert {n.name: c for n, c in run.items() if c} == {n.name: c for n, c in read.items() if c}


def test_a_flattened_size_is_the_product_of_its_dimensions():
    assert SymbolicSizes({"batch": 3, "time": 5})["batch*time"] == 15
    assert SymbolicSizes({"time": 5})["2*time"] == 10
    with pytest.raises(KeyError):
        SymbolicSizes({"batch": 3})["time"]


def test_a_shared_parameter_stays_while_anything_reads_it():
    guide = captured.tied()  # one matrix in three blocks and the head, a bias in each block
    regions = [p.region for p in partition(captured.flow_of(guide))]
    for count in range(len(regions) + 1):
        left = remaining_params(guide.graph_module, {r.exit: r.entry for r in regions[:count]})
        assert left == 8 * 8 + (3 - count) * 8


def test_a_target_tells_its_own_flops():
    guide = captured.mlp()
    bound_plan = make_plan(guide, "mlp")
    hybrid = build_hybrid(bound_plan)
    facts = {r.name: r.facts for r in hybrid.replacements}
    counted = flops_by_node(hybrid.graph_module, guide.signature, {"batch": 1}, facts)
    assert sum(counted.values()) == bound_plan.plan.new_flops
    calls = {n.target: count for n, count in counted.items() if n.op == "call_module"}
    assert calls == {r.name: hybrid.module(r).flops(r.facts, {"batch": 1}) for r in hybrid.replacements}
    assert all(isinstance(p, torch.nn.Parameter) for p in hybrid.graph_module.parameters())


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("time", 9),
        ("batch*time", 18),
        ("time + 1", 10),
        ("(((time - 1)//2)) + 1", 5),
        ("Max(1, time - 20)", 1),
        ("-((-time)//2)", 5),
    ],
)
def test_a_size_that_was_made_of_others_is_computed(written, size):
    assert SymbolicSizes({"batch": 2, "time": 9})[written] == size


@pytest.mark.parametrize("written", ["width", "time.bit_length()", "__import__('os')", "time +", ""])
def test_no_other_expression_is_a_size(written):
    with pytest.raises(KeyError):
        SymbolicSizes({"time": 9})[written]


def test_parameters_behind_a_computed_weight_count():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 16))
            self.v = nn.Parameter(torch.randn(16, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.relu(x @ (0.3 * self.w).t()) @ self.v.t()

    model = nn.Sequential(*(Computed() for _ in range(3))).eval()
    bound_plan = make_plan(capture(model, vectors(3, 6, 16)), "linear")
    assert [p.params for p in bound_plan.plan] == [2 * 16 * 32] * 3
    assert bound_plan.plan.new_params == 3 * (16 * 16 + 16)
