"""B batch, T time, D width"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import models
from tests.models import labelled, token_batches, tokens, vectors
from tests.short_runs import FAST, SHORT, causal, compile_quietly
from thesean import Recipe, Target
from thesean.errors import (
    ArtifactError,
    DataError,
)


@pytest.fixture(scope="module")
def language() -> thesean.Converted:
    """A short conversion of a language model that several tests look at."""
    data = token_batches(6)
    return compile_quietly(models.gpt2(), "rnn", data=data, eval_data=data[:2], loss=thesean.next_token, recipe=SHORT)


def test_the_literal_call_warns_that_no_data_was_given():
    model = models.gpt2()
    with pytest.warns(
        UserWarning, match=r"no data given: parts are aligned on synthetic inputs .* pass data="
    ) as caught:
        converted = thesean.compile(model, target="rnn", recipe="fast", progress=False)
    assert caught[0].filename == __file__  # the warning points at the caller
    assert [p.target for p in converted.plan] == ["rnn", "rnn"]
    assert any("synthetic" in note for note in converted.report.notes)
    assert converted(tokens(2, 7)).logits.shape == (2, 7, models.VOCABULARY)


def test_examples_without_data_give_the_sizes_of_the_synthetic_inputs():
    with pytest.warns(UserWarning, match=r"synthetic inputs \(batch 3\)"):
        compile_quietly(models.mlp(), "mlp", example_inputs=vectors(3, 8))


@pytest.mark.parametrize(
    "data",
    [
        [vectors(8, 8, seed=k) for k in range(3)],
        labelled(3, 8, 8),
        [{"input": vectors(8, 8, seed=k), "labels": torch.zeros(8)} for k in range(3)],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(vectors(24, 8), torch.zeros(24)), batch_size=8),
    ],
    ids=["tensors", "pairs", "dicts", "loader"],
)
def test_tensors_pairs_dicts_and_loaders_are_data(data):
    converted = compile_quietly(models.mlp(), "mlp", data=data)
    assert converted(vectors(2, 8)).shape == (2, 5)
    assert converted.report.guide["divergence"] == 0


def test_a_conversion_is_called_as_the_guide_is(language: thesean.Converted):
    ids = tokens(2, 7)
    by_name, by_place = language(input_ids=ids), language(ids)
    assert type(by_name).__name__ == "CausalLMOutputWithCrossAttentions"
    assert torch.equal(by_name.logits, by_place.logits)
    assert torch.equal(by_name["logits"], by_place[0])
    for wrong in ((), (ids, ids), (ids.float(),), (ids[0],)):
        with pytest.raises(DataError):
            language(*wrong)


def test_the_frontier_holds_a_usable_hybrid_for_every_count(language: thesean.Converted, tmp_path: Path):
    guide = models.gpt2()
    assert len(language.frontier) == 3
    ids = tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(language.frontier[0](ids).logits, guide(ids).logits)
        for k, hybrid in enumerate(language.frontier):
            assert hybrid(ids).logits.isfinite().all()
            assert len(hybrid.plan.replaced) == k
            assert len(hybrid.report.stages) == k
            loaded = thesean.load(hybrid.save(tmp_path / str(k)))
            assert torch.equal(loaded(ids).logits, hybrid(ids).logits)
        assert torch.equal(language.frontier[-1](ids).logits, language(ids).logits)
    assert len(language.frontier[1:]) == 2


@pytest.mark.thorough
def test_a_hybrid_does_not_change_with_the_converted_network(language: thesean.Converted):
    ids = tokens(2, 7)
    before = language.frontier[1](ids).logits
    changed = compile_quietly(models.gpt2(), "rnn", data=token_batches(6), recipe=SHORT)
    with torch.no_grad():
        for p in changed.module.parameters():
            p.mul_(2)
    assert torch.equal(language.frontier[1](ids).logits, before)
    assert torch.equal(changed.frontier[0](ids).logits, language.frontier[0](ids).logits)


def test_the_report_tells_stages_losses_and_costs(language: thesean.Converted):
    report = language.report
    assert [row.replaced for row in report.stages] == [1, 2]
    assert report.steps == 6
    assert report.train_length == models.LENGTH
    assert report.params == sum(p.numel() for p in language.module.parameters()) == language.plan.new_params
    assert report.flops == language.plan.new_flops
    assert report.guide["loss"] is not None
    assert report.recipe["name"] == "short"
    assert set(report.copied) == {"transformer.h.0.attn", "transformer.h.1.attn"}
    assert "2 of 2" in str(report)
    assert type(report).from_dict(report.to_dict()) == report


def test_the_same_seed_gives_the_same_network_and_another_one_another():
    data = labelled(3, 8, 8)
    first, second, other = (
        compile_quietly(models.mlp(), "mlp", data=data, loss=thesean.cross_entropy, recipe=SHORT, seed=seed)
        for seed in (0, 0, 1)
    )
    state = first.module.state_dict()
    assert models.same_state(second.module, state)
    assert not models.same_state(other.module, state)


def test_compiling_leaves_torchs_generator_and_the_guide_alone():
    model = models.mlp().train()
    before = models.state_of(model)
    torch.manual_seed(3)
    converted = compile_quietly(model, "mlp", data=labelled(3, 8, 8), loss=thesean.cross_entropy, recipe=SHORT)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert models.same_state(model, before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not {id(p) for p in converted.module.parameters()} & {id(p) for p in model.parameters()}


def test_a_mapping_gives_each_part_its_own_target():
    targets = {"*.0": "keep", "*.1": Target("gru", width=8), "*.2": "mingru"}
    converted = compile_quietly(causal(), targets, data=token_batches())
    assert [(p.target, p.options) for p in converted.plan] == [("keep", {}), ("gru", {"width": 8}), ("mingru", {})]
    assert repr(converted) == "Converted(2 of 3 parts -> gru, mingru)"


@pytest.mark.parametrize("asked", [{}, {"recipe": "best"}, {"budget": "1h"}, {"recipe": {"max_drop": 0.1}}])
def test_a_guide_that_is_kept_whole_is_not_trained(asked: dict[str, Any], tmp_path: Path):
    model, data = causal(), token_batches()
    converted = compile_quietly(model, "keep", data=data, loss=thesean.next_token, **asked)
    assert [p.target for p in converted.plan] == ["keep"] * 3
    assert torch.equal(converted(tokens()), model(tokens()))
    assert (converted.report.steps, converted.report.converted) == (0, converted.report.guide)
    assert len(converted.frontier) == 1
    converted.save(tmp_path / "kept")
    assert torch.equal(thesean.load(tmp_path / "kept")(tokens()), model(tokens()))


def test_of_a_guide_that_is_kept_whole_a_baseline_has_nothing_but_its_architecture():
    model, data = causal(), token_batches()
    asked: dict[str, Any] = dict(data=data, loss=thesean.next_token, recipe={"steps": 2}, progress=False)
    scratch = thesean.baseline(model, "keep", kind="scratch", **asked)
    assert scratch.report.steps == 2
    assert not torch.equal(scratch(tokens()), model(tokens()))


def test_an_edited_plan_is_what_runs(tmp_path: Path):
    model, data = causal(), token_batches()
    plan = (
        thesean.plan(model, "gru", data=data, parts=["blocks.0", "blocks.1"]).edit("*.0", "keep").edit("*.1", "mingru")
    )
    plan.to_yaml(tmp_path / "plan.yaml")
    converted = compile_quietly(model, plan=thesean.Plan.from_yaml(tmp_path / "plan.yaml"), data=data)
    assert [p.target for p in converted.plan] == ["keep", "mingru"]
    assert [n.target for n in converted.module.graph.find_nodes(op="call_module")] == ["part_0"]
    assert converted.module.part_0.family == "mingru"


def test_planning_trains_nothing_and_needs_an_example_alone():
    model = models.resnet()
    before = models.state_of(model)
    plan = thesean.plan(model, "mlp", example_inputs=vectors(2, 1, 8, 8))
    assert len(plan) == 6
    assert "spatial" in str(plan)
    assert models.same_state(model, before)


def test_parts_keep_and_granularity_reach_the_plan():
    plan = thesean.plan(causal(), "gru", example_inputs=tokens(), granularity="sublayer", keep=["*.0.mix"])
    assert [p.path for p in plan.replaced] == ["blocks.1.mix", "blocks.2.mix"]
    plan = thesean.plan(causal(), "gru", example_inputs=tokens(), parts=["blocks.[1]"])
    assert [p.path for p in plan] == ["blocks.1"]


def test_without_a_loss_the_guides_outputs_are_matched():
    data = [vectors(16, 8, seed=k) for k in range(8)]
    recipe = SHORT.model_copy(update={"steps": 40})
    converted = compile_quietly(models.mlp(), "mlp", data=data, recipe=recipe)
    untrained = compile_quietly(models.mlp(), "mlp", data=data)
    assert converted.report.converted["loss"] is None
    assert converted.report.converted["divergence"] < untrained.report.converted["divergence"]


def test_several_outputs_and_several_inputs_are_converted():
    two = compile_quietly(models.seeded(models.TwoOutputs), "mlp", data=[vectors(16, 8, seed=k) for k in range(3)])
    assert two(vectors(2, 8))["second"][0].shape == (2, 4)
    pairs = [(vectors(16, 8, seed=k), vectors(16, 8, seed=k + 9)) for k in range(3)]
    data = [((left, right), torch.zeros(16)) for left, right in pairs]
    both = compile_quietly(models.seeded(models.TwoInputs), "mlp", data=data, example_inputs=pairs[0])
    assert both(vectors(2, 8), right=vectors(2, 8)).shape == (2, 5)


def test_held_out_data_is_measured_and_a_lists_own_is_held_out_without_it():
    data, held = labelled(8, 8, 8), labelled(2, 8, 8)
    seen: list[Any] = []

    def loss(output: Any, batch: Any) -> torch.Tensor:
        seen.append(batch)
        return thesean.cross_entropy(output, batch)

    compile_quietly(models.mlp(), "mlp", data=data, eval_data=held, loss=loss)
    assert all(any(b is h for h in held) for b in seen)  # nothing trains here: every call measures
    seen.clear()
    converted = compile_quietly(models.mlp(), "mlp", data=data, loss=loss)
    assert all(b is data[-1] for b in seen)
    assert "no eval_data given: the last batch of data was held out" in converted.report.notes
    converted = compile_quietly(models.mlp(), "mlp", data=data[:3], loss=loss)
    assert "no eval_data given: measured on training batches" in converted.report.notes


def test_a_metric_is_reported():
    converted = compile_quietly(models.mlp(), "mlp", data=labelled(3, 8, 8), metric=thesean.accuracy)
    assert 0 <= converted.report.converted["metric"] <= 1


def test_a_converted_network_can_be_trained_further():
    converted = compile_quietly(models.mlp(), "mlp", data=labelled(3, 8, 8))
    x, y = labelled(1, 8, 8)[0]
    optimizer = torch.optim.SGD(converted.module.parameters(), 0.1)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(converted(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_builder_of_your_own_is_a_target():
    target = Target("mine", build=lambda part: nn.Sequential(nn.Linear(part.width_in, part.width_out), nn.ReLU()))
    data = labelled(3, 8, 8)
    converted = compile_quietly(models.mlp(), target, data=data, loss=thesean.cross_entropy, recipe=SHORT)
    assert repr(converted) == "Converted(3 of 3 parts -> mine)"
    with pytest.raises(ArtifactError, match="Subclass TargetModule"):
        converted.save("never")


def test_a_workdir_holds_plan_recipe_and_conversion(tmp_path: Path):
    data = labelled(3, 8, 8)
    converted = compile_quietly(models.mlp(), "mlp", data=data, workdir=tmp_path / "work", recipe=SHORT)
    work = tmp_path / "work"
    assert thesean.Plan.from_yaml(work / "plan.yaml") == converted.plan
    assert Recipe.from_yaml(work / "recipe.yaml") == SHORT
    assert torch.equal(thesean.load(work / "converted")(vectors(2, 8)), converted(vectors(2, 8)))
    again = compile_quietly(models.mlp(), "mlp", data=data, workdir=work, recipe=work / "recipe.yaml")
    assert models.same_state(again.module, converted.module.state_dict())


@pytest.mark.thorough
def test_positions_past_the_guides_table_are_never_read():
    converted = compile_quietly(models.gpt2(), "rnn", data=token_batches())
    assert converted(tokens(1, 80)).logits.isfinite().all()  # the table has 64 rows
    assert any("positions past the guide's table: clamp" in note for note in converted.report.notes)


@pytest.mark.parametrize("kind", ["scratch", "distillation"])
def test_baselines_take_the_recipes_steps(kind):
    data = labelled(3, 8, 8)
    base = thesean.baseline(
        models.mlp(), "mlp", kind=kind, data=data, loss=thesean.cross_entropy, recipe=SHORT, progress=False
    )
    assert base.report.steps == 6
    assert base.report.copied == {}
    assert base(vectors(2, 8)).shape == (2, 5)


@pytest.mark.thorough
def test_a_good_conversion_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # a loss of the caller's own: of one of ours, this guide's random weights would be told
        compile_quietly(
            models.gpt2(), "rnn", data=token_batches(), loss=lambda o, b: thesean.next_token(o, b), recipe=SHORT
        )


def test_a_guide_whose_activations_fade_away_converts():
    """Random weights of a deep network: each layer leaves 1e-8 of its input."""
    guide = models.mlp()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(1e-8 if parameter.ndim > 1 else 0)
    data = [models.vectors(16, 8, seed=k) for k in range(4)]
    converted = thesean.compile(guide, "mlp", data=data, eval_data=data[:1], recipe={"steps": 20}, progress=False)
    assert torch.isfinite(converted(data[0])).all()


def test_a_plan_may_be_the_path_of_its_yaml(tmp_path: Path):
    plan = thesean.plan(causal(), "gru", example_inputs=tokens(), keep=["*.0"])
    plan.to_yaml(tmp_path / "plan.yaml")
    converted = thesean.compile(
        causal(), plan=tmp_path / "plan.yaml", data=token_batches(), recipe=FAST, progress=False
    )
    assert [p.target for p in converted.plan] == ["keep", "gru", "gru"]


def test_the_frontiers_last_member_is_the_converted_network(language):
    assert language.frontier[-1] is language
    assert len(language.frontier) == len(language.plan.replaced) + 1
