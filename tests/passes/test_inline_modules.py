"""Attentions with fewer heads as operators of the graph, to be given a state there.

B batch, T time
"""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.causal_guides import family
from tests.passes.contract import Example
from thesean.passes.analyse.chunks import run_in_chunks
from thesean.passes.cache_attention import CacheAttention
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.graph.text import text
from thesean.passes.inline_modules import InlineModules
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import TargetSpec, make_plan
from thesean.passes.thread_state import ThreadState, zero_states


def hybrid(guide: Captured, target: TargetSpec = "narrow-heads", count: int | None = None) -> fx.GraphModule:
    torch.manual_seed(0)
    return build_hybrid(make_plan(guide, target), count).graph_module.eval()


class Sums(nn.Module):
    """x_BTD -> y_BTD: a weighted sum of all steps so far, or with `ahead` of all to come."""

    def __init__(self, ahead: bool = False) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.arange(1.0, 4.0))
        self.ahead = ahead

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flip(1) if self.ahead else x).cumsum(1) * self.weight_D


def graph_of(part: nn.Module) -> tuple[fx.GraphModule, Signature]:
    graph = fx.Graph()
    call = graph.call_module("part", (graph.call_function(torch.ops.aten.tanh.default, (graph.placeholder("x"),)),))
    graph.output(graph.call_function(torch.ops.aten.exp.default, (call,)))
    spec = InputSpec(name="x", dtype=torch.float32, shape=("batch", "time", 3))
    return fx.GraphModule({"part": part}, graph), Signature(inputs=(spec,))


def test_the_graph_before_and_after():
    before, signature = graph_of(Sums())
    assert text(before.graph) == [
        "x = placeholder x",
        "tanh_default = aten.tanh.default(x)",
        "part = part(tanh_default)",
        "exp_default = aten.exp.default(part)",
        "return exp_default",
    ]
    assert text(InlineModules(signature)(before).graph_module.graph) == [
        "x = placeholder x",
        "tanh_default = aten.tanh.default(x)",
        "weight_d = get_attr part.weight_D",
        "cumsum = aten.cumsum.default(tanh_default, 1)",
        "mul = aten.mul.Tensor(cumsum, weight_d)",
        "exp_default = aten.exp.default(mul)",
        "return exp_default",
    ]


class Both(Sums):
    """x_BTD -> (y_BTD, x_BTD)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


def test_a_module_of_several_outputs_stays_one():
    before, signature = graph_of(Both())
    (call,) = before.graph.find_nodes(op="call_module")
    with before.graph.inserting_after(call):
        first = before.graph.call_function(operator.getitem, (call, 0))
    call.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    before.recompile()
    assert not InlineModules(signature)(before).modified


@pytest.mark.parametrize("training", [True, False])
def test_what_is_known_of_the_graph_and_its_mode_stay(training):
    before, signature = graph_of(Sums())
    before.train(training)
    before.meta["symbols"] = {"s0": "batch"}
    after = InlineModules(signature)(before).graph_module
    assert after.meta["symbols"] == {"s0": "batch"}
    assert after.training == training
    assert set(dict(after.named_parameters())) == {"part.weight_D"}
    assert not list(after.graph.find_nodes(op="call_module"))


def test_parameters_are_shared_and_the_incoming_graph_stays():
    guide = captured.gpt2()
    before = hybrid(guide)
    rows = text(before.graph)
    after = InlineModules(guide.signature)(before).graph_module
    assert text(before.graph) == rows
    assert {id(p) for p in after.parameters()} == {id(p) for p in before.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("target", ["narrow-heads", {"*.0": "narrow-heads", "*.1": "linear-attention"}])
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_fewer_heads_decode_with_a_cache(name, masked, target):
    guide = family(name, masked=masked)
    stateless = hybrid(guide, target)
    inlined = InlineModules(guide.signature)(stateless).graph_module
    cached = CacheAttention(guide.signature)(inlined).graph_module
    threaded = ThreadState(guide.signature)(cached).graph_module
    assert threaded.meta["rows_are_alone"]
    inputs = {"input_ids": models.tokens(3, 12)}
    tokens_BT = torch.ones(3, 12, dtype=torch.int64)
    if masked:
        tokens_BT[0, :4] = tokens_BT[1, 6:8] = 0
        inputs["attention_mask"] = tokens_BT
    whole_BTV = stateless(**inputs)["logits"]
    for chunks in ((1,) * 12, (1, 5, 6)):
        pieces, _ = run_in_chunks(threaded, guide.signature, inputs, zero_states(threaded, 3), chunks)
        got_BTV = torch.cat([piece[0] for piece in pieces], 1)
        seen = tokens_BT.bool()
        torch.testing.assert_close(got_BTV[seen], whole_BTV[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["gru", "linear-attention"])
def test_recurrences_and_what_works_token_by_token_stay_modules(target):
    guide = captured.gpt2()
    result = InlineModules(guide.signature)(hybrid(guide, target))
    assert result.reason == "no module without a state reads earlier steps"


def test_what_looks_ahead_stays_a_module():
    part, signature = graph_of(Sums(ahead=True))
    assert not InlineModules(signature)(part).modified
    encoder = captured.bert()
    result = InlineModules(encoder.signature)(hybrid(encoder))
    assert result.reason == "no module without a state reads earlier steps"


def example() -> Example:
    guide = captured.gpt2()
    return Example(InlineModules(guide.signature), hybrid(guide), (models.tokens(3, 9),))
