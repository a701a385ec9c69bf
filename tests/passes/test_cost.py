"""B batch, T time, D width"""

from __future__ import annotations

import torch

from tests import captured, models
from thesean.passes.cost import count_params, flops_by_node
from thesean.passes.draft import make_draft
from thesean.passes.hybrid import build_hybrid
from thesean.passes.partition import partition


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


def test_a_target_tells_its_own_flops():
    guide = captured.mlp()
    draft = make_draft(guide, "mlp")
    hybrid = build_hybrid(draft)
    facts = {r.name: r.facts for r in hybrid.replacements}
    counted = flops_by_node(hybrid.graph_module, guide.signature, {"batch": 1}, facts)
    assert sum(counted.values()) == draft.plan.new_flops
    calls = {n.target: count for n, count in counted.items() if n.op == "call_module"}
    assert calls == {r.name: hybrid.module(r).flops(r.facts, {"batch": 1}) for r in hybrid.replacements}
    assert all(isinstance(p, torch.nn.Parameter) for p in hybrid.graph_module.parameters())
