"""B batch, T time, D width"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import hand_written, models
from tests.models import labelled, token_batches, tokens, vectors
from thesean import Recipe, Target
from thesean.distill.align import Aligner
from thesean.errors import (
    ArtifactError,
    CaptureError,
    DataError,
    NumericalError,
    PlanError,
    TargetMismatchError,
    UnknownNameError,
    WriteError,
)
from thesean.recipe import Alignment, FineTuning

SHORT = Recipe(
    name="short",
    steps=6,
    warmup=1,
    alignment=Alignment(share=0.5, check_every=2, patience=10, ceiling=0),
    fine_tuning=FineTuning(learning_rate=1e-3),
)
FAST = Recipe.named("fast")


def compile_quietly(model: nn.Module, target: Any = "rnn", **settings: Any) -> thesean.Converted:
    return thesean.compile(model, target, progress=False, **{"recipe": FAST, **settings})


def causal() -> nn.Module:
    """A small language model."""
    return models.seeded(hand_written.Tied)


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
    assert "no eval_data given: the last 1 batches of data were held out" in converted.report.notes
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


# Bad input: a typed error that says what to do, and the guide as it was.


class Constant(nn.Module):
    """A guide whose activations don't vary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def nan_data() -> list[torch.Tensor]:
    data = [vectors(8, 8, seed=k) for k in range(3)]
    data[1][0, 0] = float("nan")
    return data


def nan_loss(output: Any, batch: Any) -> torch.Tensor:
    return thesean.cross_entropy(output, batch) * float("nan")


def nan_gradient(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.mean() * (float("nan") if torch.is_grad_enabled() else 1.0)


PAPER = Recipe.named("paper").model_copy(update={"steps": 4})


def _wide(part: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(part.width_in, 64), nn.Linear(64, part.width_out))


def _narrow(part: Any) -> nn.Module:
    return nn.Linear(part.width_in, part.width_out)


BAD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]] = {
    "empty data": (models.mlp, "mlp", {"data": []}, DataError, "data is empty: expected at least one batch"),
    "empty held-out data": (
        models.mlp, "mlp", {"data": labelled(3, 8, 8), "eval_data": []}, DataError, "data is empty",
    ),
    "an iterator": (models.mlp, "mlp", {"data": iter(labelled(3, 8, 8))}, DataError, "read only once"),
    "data that is a number": (models.mlp, "mlp", {"data": 3}, DataError, "data is a int; expected an iterable"),
    "one tensor": (models.mlp, "mlp", {"data": vectors(8, 8)}, DataError, r"one tensor; .*data=\[x\]"),
    "batches of another width": (models.mlp, "mlp", {"data": [vectors(8, 7)]}, DataError, "does not run on the"),
    "one batch of another width": (
        models.mlp, "mlp", {"data": [vectors(8, 8), vectors(8, 7)]}, DataError, r"batch 1: expected input: .*\(8, 7\)",
    ),
    "a held-out batch of another width": (
        models.mlp, "mlp", {"data": [vectors(8, 8)] * 3, "eval_data": [vectors(8, 7)]}, DataError, "batch 0: expected",
    ),
    "batches without the input": (
        causal, "rnn", {"data": [{"input_ids": tokens()}, {"ids": tokens()}]}, DataError, "no input 'input_ids'",
    ),
    "text": (models.mlp, "mlp", {"data": ["text"]}, DataError, "expected a tensor"),
    "nothing to go by": (models.mlp, "mlp", {}, DataError, r"no example inputs: .*Pass example_inputs=\(x,\) or data="),
    "NaN in the data": (models.mlp, "mlp", {"data": nan_data()}, NumericalError, "NaN"),
    "NaN in the loss": (
        models.mlp, "mlp", {"data": labelled(3, 8, 8), "loss": nan_loss}, NumericalError,
        r"held-out batch 0: loss\(output, batch\) is nan for the guide's own outputs",
    ),
    "NaN in the loss where it is trained on": (
        models.mlp, "mlp", {"data": labelled(3, 8, 8), "loss": nan_gradient, "recipe": SHORT}, NumericalError,
        r"fine-tuning: the loss is nan at step \d+\. Lower",
    ),
    "an unknown target": (
        causal, "rn", {"data": token_batches()}, UnknownNameError, r"unknown target 'rn'; did you mean 'rnn'\?",
    ),
    "an unknown option": (
        causal, Target("gru", wide=3), {"data": token_batches()}, TargetMismatchError, "option 'wide'.*known",
    ),
    "an unknown recipe": (
        causal, "rnn", {"data": token_batches(), "recipe": "defualt"}, UnknownNameError, "did you mean 'default'",
    ),
    "an unknown measure": (
        models.mlp, "mlp",
        {"data": labelled(3, 8, 8), "recipe": SHORT.model_copy(update={"alignment": Alignment(measure="ckaa")})},
        UnknownNameError, "unknown measure 'ckaa'; did you mean 'cka'",
    ),
    "an mlp for unbounded mixing": (
        models.bert, "mlp", {"data": token_batches()}, TargetMismatchError,
        r"encoder\.layer\.0: target 'mlp' expected .*unbounded sequence: choose target 'rnn'",
    ),
    "an mlp for a causal part": (
        causal, "mlp", {"data": token_batches()}, TargetMismatchError, r"blocks\.0: .*Choose target 'rnn'",
    ),
    "a recurrence for images": (
        models.resnet, "rnn", {"data": [vectors(4, 1, 8, 8)]}, TargetMismatchError, r"blocks\.0.*Choose target 'mlp'",
    ),
    "a part glob without a match": (
        causal, "rnn", {"data": token_batches(), "parts": ["transformer.g.*"]}, PlanError,
        "no part matches 'transformer.g.*'",
    ),
    "a keep glob without a match": (
        causal, "rnn", {"data": token_batches(), "keep": ["h.9"]}, PlanError, "keep: no part matches 'h.9'",
    ),
    "a target glob without a match": (
        causal, {"h.9": "rnn"}, {"data": token_batches()}, PlanError, "target: no part matches 'h.9'",
    ),
    "everything kept": (
        causal, "rnn", {"data": token_batches(), "keep": ["*"]}, PlanError, "nothing is replaced: .*Check keep=",
    ),
    "overlapping parts": (
        causal, "rnn", {"data": token_batches(), "parts": ["blocks.0", "blocks.0.mix"]}, PlanError, "overlap",
    ),
    "an unknown granularity": (
        causal, "rnn", {"data": token_batches(), "granularity": "layer"}, PlanError, "'sublayer' or 'finest'",
    ),
    "a plan's path that isn't there": (
        causal, "rnn", {"data": token_batches(), "plan": "nowhere/plan.yaml"}, PlanError, "can't read the plan",
    ),
    "a plan that is none": (
        causal, "rnn", {"data": token_batches(), "plan": 3}, PlanError, "expected a Plan or the path .*found int",
    ),
    "a plan and a target": (
        causal, "gru", {"data": token_batches(), "plan": "another", "keep": ["*.0"]}, PlanError,
        "leave keep, target out, or edit the plan",
    ),
    "globs that are numbers": (
        causal, "rnn", {"data": token_batches(), "parts": [1]}, PlanError, r"parts: expected globs.*found \[1\]",
    ),
    "a merge that is text": (
        causal, "rnn", {"data": token_batches(), "merge": "2"}, PlanError, "merge: expected a whole number",
    ),
    "half a part": (
        causal, "rnn", {"data": token_batches(), "target_parts": 1.5}, PlanError, "target_parts: expected a whole",
    ),
    "an unknown scope": (
        causal, Target("gru", scope="parts"), {"data": token_batches()}, TargetMismatchError,  # type: ignore[arg-type]
        "expected scope='mixing', 'token-wise' or 'part', found 'parts'",
    ),
    "a scope of other families": (
        causal, Target("gru", scope="members"), {"data": token_batches(), "merge": 2}, TargetMismatchError,
        "found 'members'",
    ),
    "a builder of another width": (
        causal, Target("bad", build=lambda part: nn.Linear(part.width_in, 7)), {"data": token_batches()},
        TargetMismatchError,
        r"blocks\.0: target 'bad' expected a module that takes .*found one that gives \(2, 11, 7\)",
    ),
    "a builder that fails": (
        causal, Target("bad", build=lambda part: part.width), {"data": token_batches()}, TargetMismatchError,  # type: ignore[attr-defined]
        r"blocks\.0: target 'bad': build\(part\) raised AttributeError",
    ),
    "two builders of one name": (
        causal, {"*.0": Target("mine", build=_wide), "*.1": Target("mine", build=_narrow)},
        {"data": token_batches()}, PlanError, "are named 'mine'. Rename one",
    ),
    "data of another dtype": (
        models.mlp, "mlp", {"data": [vectors(8, 8), vectors(8, 8).double()]}, DataError, "batch 1: .*Convert it",
    ),
    "data on another device": (
        models.mlp, "mlp", {"data": [vectors(8, 8).to("meta")]}, DataError, "on meta, the guide on cpu. Move one",
    ),
    "fewer than four examples for CKA": (
        models.mlp, "mlp", {"data": [vectors(3, 8, seed=k) for k in range(3)], "recipe": PAPER}, DataError,
        r"0\.\.1: .*4",
    ),
    "activations that don't vary, under CKA": (
        lambda: _constant(), "mlp", {"data": [vectors(8, 8, seed=k) for k in range(3)], "recipe": PAPER}, DataError,
        r"layers\.1: cka: y is constant",
    ),
    "not a module": (lambda: torch.relu, "mlp", {"data": [vectors(8, 8)]}, CaptureError, "expected a torch.nn.Module"),  # type: ignore[dict-item, return-value]
    "a plan of another guide": (
        causal, "rnn", {"data": token_batches(), "plan": "another"}, PlanError, r"doesn't fit this guide.*Make a new",
    ),
    "a loss without labels": (
        models.mlp, "mlp", {"data": [vectors(8, 8)] * 3, "loss": thesean.cross_entropy}, DataError, "no labels",
    ),
}  # fmt: skip


def _constant() -> nn.Module:
    model = models.seeded(Constant)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-1)
    return model


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_gives_a_typed_error_and_leaves_the_guide(case):
    make, target, settings, kind, reason = BAD[case]
    model = make()
    before = models.state_of(model) if isinstance(model, nn.Module) else {}
    settings = {"recipe": FAST, "progress": False, **settings}
    if settings.get("plan") == "another":
        settings["plan"] = thesean.plan(models.token_mixer(), "gru", example_inputs=vectors(3, 6, 8))
    with pytest.raises(kind, match=reason) as caught:
        thesean.compile(model, target, **settings)
    assert isinstance(caught.value, thesean.TheseanError)
    if isinstance(model, nn.Module):
        assert models.same_state(model, before)
        assert not model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = self.layer(x)
        return x


def test_a_guide_that_branches_on_values_names_the_line_of_this_file():
    with pytest.raises(CaptureError, match=r"test_compile\.py, line \d+, in forward: if x\.sum\(\) > 0"):
        compile_quietly(Branching(), "mlp", data=[vectors(8, 8)])


def test_a_folder_that_cannot_be_written_fails_before_anything_trains(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    called: list[int] = []

    def loss(output: Any, batch: Any) -> torch.Tensor:
        called.append(1)
        return thesean.cross_entropy(output, batch)

    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WriteError, match=r"can't write workdir="):
            compile_quietly(models.mlp(), "mlp", data=labelled(3, 8, 8), loss=loss, workdir=folder)
    assert not called
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_whose_conversion_folder_is_taken_fails_before_anything_trains(tmp_path: Path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "thesis.tex").write_text("years of work")
    called: list[int] = []

    def loss(output: Any, batch: Any) -> torch.Tensor:
        called.append(1)
        return thesean.cross_entropy(output, batch)

    with pytest.raises(thesean.TheseanError, match="holds no conversion"):
        compile_quietly(models.mlp(), "mlp", data=labelled(3, 8, 8), loss=loss, workdir=tmp_path)
    assert not called
    assert (tmp_path / "converted" / "thesis.tex").read_text() == "years of work"


def written(workdir: Path) -> dict[Path, bytes]:
    """What a run ends with, without the checkpoints and the steps of the one that is under way."""
    files = (p for p in workdir.rglob("*.*") if "checkpoints" not in p.parts and p.name != "steps.jsonl")
    return {p: p.read_bytes() for p in files}


@pytest.mark.parametrize("at", [3, 9])
def test_an_interruption_leaves_the_guide_and_the_earlier_conversion(at: int, tmp_path: Path):
    model, data = models.mlp().train(), labelled(3, 8, 8)
    earlier = compile_quietly(model, "mlp", data=data, workdir=tmp_path)
    files = written(tmp_path)
    assert {p.name for p in files} >= {"plan.yaml", "recipe.yaml", "graph.json"}
    before = models.state_of(model)
    calls: list[int] = []

    def loss(output: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if torch.is_grad_enabled() and len(calls) > at:
            raise KeyboardInterrupt
        return thesean.cross_entropy(output, batch)

    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="begun anew"):
        compile_quietly(model, "mlp", data=data, loss=loss, workdir=tmp_path, recipe=SHORT, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert models.same_state(model, before)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert written(tmp_path) == files
    loaded = thesean.load(tmp_path / "converted")
    assert torch.equal(loaded(vectors(2, 8)), earlier(vectors(2, 8)))


def test_an_interruption_of_alignment_leaves_the_guide(monkeypatch: pytest.MonkeyPatch):
    model = models.mlp()
    before = models.state_of(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Aligner, "settle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_quietly(model, "mlp", data=labelled(3, 8, 8), recipe=SHORT)
    assert models.same_state(model, before)
    assert all(p.requires_grad for p in model.parameters())


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
