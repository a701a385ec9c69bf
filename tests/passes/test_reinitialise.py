from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from tests import captured
from tests.models import VOCABULARY, tokens
from tests.passes.contract import Example
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.reinitialise import Reinitialise


def fresh(guide) -> fx.GraphModule:
    torch.manual_seed(0)
    result = Reinitialise()(clone(guide.graph_module))
    assert result.modified
    return result.graph_module


@pytest.mark.parametrize(
    "guide", [captured.gpt2, captured.bert, captured.llama, captured.encoder, captured.resnet, captured.functional]
)
def test_nothing_of_the_guide_is_left(guide):
    before = dict(guide().graph_module.named_parameters())
    for name, value in fresh(guide()).named_parameters():
        constant = value.unique().numel() == 1  # biases and gains: the guide's may not have been trained yet
        assert constant or not torch.equal(value, before[name]), name
        assert value.ndim < 2 or not constant


def test_values_change_and_the_graph_does_not():
    guide = captured.mlp().graph_module
    assert text(fresh(captured.mlp()).graph) == text(guide.graph)


def test_matrices_are_drawn_by_their_inputs_tables_small_norms_and_biases_plain():
    weights = dict(fresh(captured.gpt2()).named_parameters(remove_duplicate=False))
    first = weights["transformer.h.0.mlp.c_fc.weight"]  # Conv1D: inputs first, 16 x 64
    assert first.std().item() == pytest.approx(16**-0.5, rel=0.1)
    second = weights["transformer.h.0.mlp.c_proj.weight"]
    assert second.std().item() == pytest.approx(64**-0.5, rel=0.1)
    tied = next(w for w in weights.values() if w.shape == (VOCABULARY, 16))
    assert tied.std().item() == pytest.approx(0.02, rel=0.15)
    assert weights["transformer.wpe.weight"].std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(weights["transformer.h.0.ln_1.weight"], torch.ones(16))
    assert torch.equal(weights["transformer.h.0.ln_1.bias"], torch.zeros(16))
    assert torch.equal(weights["transformer.h.0.mlp.c_fc.bias"], torch.zeros(64))


def test_the_gain_of_a_norm_that_is_spelled_out_is_one():
    weights = dict(fresh(captured.llama()).named_parameters())
    assert torch.equal(weights["model.layers.0.input_layernorm.weight"], torch.ones(32))


def test_running_statistics_start_anew():
    graph_module = clone(captured.resnet().graph_module)
    with torch.no_grad():
        for buffer in graph_module.buffers():
            buffer.fill_(3)
    Reinitialise()(graph_module)
    buffers = dict(graph_module.named_buffers())
    assert torch.equal(buffers["blocks.0.bn1.running_mean"], torch.zeros(4))
    assert torch.equal(buffers["blocks.0.bn1.running_var"], torch.ones(4))
    weights = dict(graph_module.named_parameters())
    assert torch.equal(weights["blocks.0.bn1.weight"], torch.ones(4))
    assert torch.equal(weights["blocks.0.bn1.bias"], torch.zeros(4))


@pytest.mark.thorough
def test_masks_and_constants_stay():
    guide = captured.bert(attention="eager")
    before = dict(guide.graph_module.named_buffers())
    for name, value in fresh(guide).named_buffers():
        assert torch.equal(value, before[name])


def test_target_modules_keep_what_their_family_gave_them():
    torch.manual_seed(0)
    hybrid = build_hybrid(make_plan(captured.gpt2(), "gru"), copy_weights=False)
    before = [{k: v.clone() for k, v in hybrid.module(r).state_dict().items()} for r in hybrid.replacements]
    Reinitialise()(hybrid.graph_module)
    for replacement, state in zip(hybrid.replacements, before, strict=True):
        now = hybrid.module(replacement).state_dict()
        assert all(torch.equal(now[k], state[k]) for k in state)
    assert hybrid.graph_module(tokens(2, 5))["logits"].isfinite().all()


def test_the_same_seed_draws_the_same_weights():
    first, second = (fresh(captured.gpt2()).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_graph_without_parameters_is_left_alone():
    graph_module = fx.symbolic_trace(nn.ReLU())
    result = Reinitialise()(graph_module)
    assert not result.modified
    assert result.reason == "the graph reads no parameters"


def example() -> Example:
    return Example(Reinitialise(), clone(captured.gpt2().graph_module), (tokens(),), same_outputs=False)
