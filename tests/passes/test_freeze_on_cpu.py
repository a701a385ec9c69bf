from __future__ import annotations

import torch
from torch import fx, nn

from tests import captured
from tests.models import tokens
from tests.passes.contract import Example
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text


def test_what_is_made_elsewhere_is_made_on_the_cpu():
    graph = fx.Graph()
    x = graph.placeholder("x")
    device = torch.device("meta")  # as on a GPU, and there on every machine
    steps = graph.call_function(torch.ops.aten.arange.default, (3,), {"device": device})
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, steps)))
    elsewhere = fx.GraphModule(nn.Module(), graph)
    before = [
        "x = placeholder x",
        "arange_default = aten.arange.default(3, device=meta)",
        "add_tensor = aten.add.Tensor(x, arange_default)",
        "return add_tensor",
    ]
    assert text(elsewhere.graph) == before
    frozen = FreezeOnCpu()(elsewhere).graph_module
    assert text(frozen.graph) == [line.replace("device=meta", "device=cpu") for line in before]
    assert torch.equal(frozen(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]))
    assert text(elsewhere.graph) == before


def test_the_copy_is_in_eval_mode_without_gradients_and_the_original_stays_as_it_was():
    guide = clone(captured.gpt2().graph_module).train()
    frozen = FreezeOnCpu()(guide).graph_module
    assert not any(m.training for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert guide.training
    assert all(p.requires_grad for p in guide.parameters())
    assert not {id(p) for p in frozen.parameters()} & {id(p) for p in guide.parameters()}
    assert [p.data_ptr() for p in frozen.parameters()] == [p.data_ptr() for p in guide.parameters()]  # in memory once


def example() -> Example:
    return Example(FreezeOnCpu(), clone(captured.gpt2().graph_module), (tokens(),), applies_everywhere=True)
