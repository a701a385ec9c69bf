"""The matrix: every guide is planned, converted with a few steps, run at other sizes, saved, loaded and exported.

What the plan finds is asserted part by part: the right parts, in order, and no others.

B batch, T time
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

import thesean
from tests.guides import GUIDES, LENGTH, Guide, mixtral
from tests.models import same_state, state_of
from thesean.errors import CaptureError, TargetMismatchError
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import is_single_entry_single_exit
from thesean.passes.graph.record import record
from thesean.passes.plan.partition import partition

RESNET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Block by block and half by half; `mixing` is one word for all blocks, or one each.

    The target is "rnn" where weights are laid out in a way of their own for it to copy; else a GRU, whose file is made
    in half the time.
    """

    blocks: tuple[str, ...]
    halves: tuple[str, ...]
    mixing: str | tuple[str, ...]
    target: str = "rnn"
    replaces: tuple[str, ...] = ()


def layers(pattern: str, count: int, *halves: str) -> tuple[str, ...]:
    """`pattern` with each number, and under it each of `halves`."""
    names = [pattern.format(k) for k in range(count)]
    return tuple(f"{n}.{half}" for n in names for half in halves) if halves else tuple(names)


def transformer(pattern: str, attention: str, mlp: str, mixing: str, count: int = 2, target: str = "rnn") -> Expected:
    return Expected(
        blocks=layers(pattern, count),
        halves=layers(pattern, count, attention, mlp),
        mixing=mixing,
        target=target,
        replaces=layers(pattern, count, attention),
    )


def resnet(depth: int) -> Expected:
    blocks = tuple(f"layer{s + 1}.{k}" for s, count in enumerate(RESNET[depth]) for k in range(count))
    return Expected(blocks=blocks, halves=blocks, mixing="spatial", target="mlp", replaces=blocks)


def stack(*names: str) -> Expected:
    """Blocks of a causal mixing layer and a token-wise MLP."""
    return Expected(
        target="gru",
        blocks=names,
        halves=tuple(f"{n}.{half}" for n in names for half in ("mix", "mlp")),
        mixing="causal",
        replaces=tuple(f"{n}.mix" for n in names),
    )


EXPECTED = {
    "gpt2": transformer("transformer.h.{}", "attn", "mlp", "causal"),
    "gpt_neox": transformer("gpt_neox.layers.{}", "attention", "mlp", "causal"),
    "llama": transformer("model.layers.{}", "self_attn", "mlp", "causal"),
    "qwen2": transformer("model.layers.{}", "self_attn", "mlp", "causal", target="gru"),
    "opt": transformer("model.decoder.layers.{}", "self_attn", "fc1..fc2", "causal"),
    "mixtral": transformer("model.layers.{}", "self_attn", "mlp", "causal", target="gru"),
    "bert": transformer("encoder.layer.{}", "attention", "intermediate.dense..output.dense", "bidirectional"),
    "vit": transformer("vit.layers.{}", "attention", "mlp", "bidirectional"),
    "whisper_encoder": transformer("layers.{}", "self_attn", "fc1..fc2", "bidirectional", target="gru"),
    "encoder": transformer("layers.{}", "self_attn", "linear1..linear2", "bidirectional", 3),
    "mixer": transformer("blocks.{}", "tokens", "channels", "bidirectional", 3, target="gru"),
    "t5": Expected(
        blocks=(
            "encoder.block.0", "encoder.block.1",
            "decoder.block.0.layer.0", "decoder.block.0.layer.2", "decoder.block.1.layer.0", "decoder.block.1.layer.2",
        ),
        halves=(
            *layers("encoder.block.{}.layer", 2, "0.SelfAttention", "1.DenseReluDense"),
            *layers("decoder.block.{}.layer", 2, "0.SelfAttention", "2.DenseReluDense"),
        ),
        target="gru",
        mixing=("bidirectional", "bidirectional", "causal", "token-wise", "causal", "token-wise"),
        replaces=(
            *layers("encoder.block.{}.layer", 2, "0.SelfAttention"),
            *layers("decoder.block.{}.layer", 2, "0.SelfAttention"),
        ),
    ),
    "resnet18": resnet(18),
    "resnet34": resnet(34),
    "resnet50": resnet(50),
    "convnet1d": Expected(
        blocks=layers("blocks.{}", 3), halves=layers("blocks.{}", 3), mixing="spatial", target="mlp",
        replaces=layers("blocks.{}", 3),
    ),
    "lstm_classifier": Expected(
        blocks=("lstm.l0", "lstm.l1"), halves=("lstm.l0", "lstm.l1"), mixing="causal", target="gru",
        replaces=("lstm.l0", "lstm.l1"),
    ),
    "lstm_tagger": Expected(
        blocks=("first", "second"), halves=("first", "second"), mixing=("causal", "bidirectional"),
        target="gru", replaces=("first", "second"),
    ),
    "two_inputs": stack("left.1", "right.1", "body.0", "body.1", "body.2"),
    "two_outputs": stack("body.0", "body.1", "body.2", "body.3"),
    "tied": stack("blocks.0", "blocks.1", "blocks.2"),
    "looped": Expected(
        blocks=("block", "block#2", "block#3"),
        halves=("block.mix", "block.mlp", "block.mix#2", "block.mlp#2", "block.mix#3", "block.mlp#3"),
        mixing="causal",
        target="gru",
        replaces=("block.mix", "block.mix#2", "block.mix#3"),
    ),
}  # fmt: skip

# one while one works, the others in the whole suite
_FIRST = {"gpt2"}
EVERY = pytest.mark.parametrize(
    "name", [n if n in _FIRST else pytest.param(n, marks=pytest.mark.thorough) for n in GUIDES]
)


@cache
def converted(name: str) -> thesean.Converted:
    """Made once for all tests, which may not change it."""
    guide = GUIDES[name]
    model = guide.model()
    before = state_of(model)
    made = thesean.compile(
        model, EXPECTED[name].target, data=guide.batches(), eval_data=guide.batches(2), recipe=dict(steps=4),
        progress=False,
    )  # fmt: skip
    assert same_state(model, before)
    return made


def guide_graph(name: str) -> fx.GraphModule:
    return converted(name).frontier[0].module


def leaves(output: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


def other_sizes(guide: Guide) -> list[dict[str, torch.Tensor]]:
    sizes = [(1, 1), (2, 5), (5, LENGTH + 5)] if guide.time else [(1, LENGTH), (5, LENGTH)]
    return [guide.inputs(batch, length, 7) for batch, length in sizes]


@EVERY
def test_the_parts_are_the_blocks_that_a_person_would_name_in_order(name):
    expected, plan = EXPECTED[name], converted(name).plan
    assert tuple(p.path for p in plan) == expected.blocks
    mixing = expected.mixing if isinstance(expected.mixing, tuple) else (expected.mixing,) * len(expected.blocks)
    assert tuple(p.mixing for p in plan) == mixing
    assert tuple(path for p in plan for path in p.replaces) == expected.replaces


@EVERY
def test_the_sublayers_are_the_branches_of_those_blocks(name):
    flow = data_flow(guide_graph(name).graph)
    found = partition(flow, "sublayer")
    assert tuple(p.path for p in found) == EXPECTED[name].halves
    assert all(is_single_entry_single_exit(flow, p.region) for p in found)


@EVERY
def test_the_plan_counts_the_parameters_that_the_conversion_has(name):
    made = converted(name)
    assert made.plan.new_params == sum(p.numel() for p in made.module.parameters())
    assert made.plan.params == sum(p.numel() for p in GUIDES[name].model().parameters())


@EVERY
def test_the_captured_guide_runs_at_other_sizes_and_gives_the_guides_numbers(name):
    guide, graph_module = GUIDES[name], guide_graph(name)
    model = guide.model()
    for inputs in other_sizes(guide):
        with torch.no_grad():
            expected, found = leaves(model(**inputs)), leaves(graph_module(**inputs))
        found = found[: len(expected)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@EVERY
def test_the_conversion_runs_at_other_sizes_with_finite_outputs_of_the_guides_shapes(name):
    guide, made = GUIDES[name], converted(name)
    for inputs in other_sizes(guide):
        with torch.no_grad():
            found, expected = leaves(made(**inputs)), leaves(guide_graph(name)(**inputs))
        assert [v.shape for v in found] == [v.shape for v in expected]
        assert all(bool(torch.isfinite(v).all()) for v in found)


@EVERY
def test_what_is_not_replaced_stays_bit_identical(name):
    """Of each partial conversion, before fine-tuning: all parameters, and all values that no replacement reaches."""
    guide = guide_graph(name)
    inputs = GUIDES[name].inputs(2, LENGTH, 3)
    wanted = {n.name: v for n, v in record(guide, inputs).items()}
    weights = dict(guide.named_parameters(remove_duplicate=False))
    for hybrid in (converted(name).frontier[1].module, converted(name).frontier[-2].module):
        replaced = {str(n.target) for n in hybrid.graph.find_nodes(op="call_module")}
        assert replaced
        kept = {k: p for k, p in hybrid.named_parameters(remove_duplicate=False) if k.split(".")[0] not in replaced}
        assert kept
        assert all(torch.equal(p, weights[k]) for k, p in kept.items())
        reached: set[fx.Node] = set()
        for node, value in record(hybrid, inputs).items():
            if node.op == "call_module" or not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
            elif node.op == "call_function" and isinstance(value, torch.Tensor):
                assert torch.equal(value, wanted[node.name])


@EVERY
def test_a_saved_conversion_gives_the_same_numbers(name, tmp_path):
    made, inputs = converted(name), GUIDES[name].inputs(2, LENGTH, 5)
    made.save(tmp_path / "saved")
    loaded = thesean.load(tmp_path / "saved")
    with torch.no_grad():
        pairs = zip(leaves(loaded.module(**inputs)), leaves(made.module(**inputs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@EVERY
def test_the_exported_file_gives_the_conversions_numbers(name, tmp_path):
    report = converted(name).export(tmp_path / "model.onnx")
    assert report.checks
    assert all(c.max_abs_error < report.tolerance for c in report.checks)
    if GUIDES[name].time:
        assert len({c.shape for c in report.checks}) >= 4  # other lengths than the traced one


@pytest.mark.thorough
def test_cells_of_a_guide_that_are_kept_are_exported_at_any_length(tmp_path):
    guide = GUIDES["lstm_tagger"]
    made = thesean.compile(
        guide.model(), "gru", data=guide.batches(), eval_data=guide.batches(2), keep=["second"], recipe=dict(steps=2),
        progress=False,
    )  # fmt: skip
    report = made.export(tmp_path / "model.onnx")
    assert {c.shape for c in report.checks} >= {(2, 7), (2, 19), (5, 3), (1, 1)}
    assert "mixes time outside of the converted parts" in report.note


@pytest.mark.thorough
def test_attention_over_another_sequence_is_kept_and_the_reason_told():
    (note,) = converted("t5").plan.notes
    assert note.startswith("decoder.block.0.layer.1, decoder.block.1.layer.1 are left to the guide")
    assert note.endswith("a target has one input, found a branch that reads several")
    (state,) = converted("gpt2").plan.notes
    assert state.startswith("state: ")


@pytest.mark.thorough
def test_a_feature_map_is_no_sequence():
    for name, first in (("resnet18", "layer1.0"), ("convnet1d", "blocks.0")):
        guide = GUIDES[name]
        with pytest.raises(TargetMismatchError, match=rf"{first}.*expected a sequence \(batch, time, width\)"):
            thesean.plan(guide.model(), "rnn", example_inputs=guide.example())


@pytest.mark.thorough
def test_a_causal_part_is_no_vector():
    guide = GUIDES["two_inputs"]
    with pytest.raises(TargetMismatchError, match=r"left\.1: target 'mlp' .* would read the future"):
        thesean.plan(guide.model(), "mlp", example_inputs=guide.example())


@pytest.mark.thorough
def test_a_router_that_loops_over_the_experts_it_picked_is_refused_with_the_line():
    guide = GUIDES["mixtral"]
    with pytest.raises(CaptureError, match=r"line \d+, in forward: for expert_idx .* convert a submodule instead"):
        thesean.plan(mixtral(experts="eager").eval(), example_inputs=guide.example())
