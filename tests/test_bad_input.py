"""Bad input, and interruptions: a typed error that says what to do, and the guide and earlier files as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import models
from tests.models import labelled, token_batches, tokens, vectors
from tests.short_runs import FAST, SHORT, causal, compile_quietly
from thesean import Recipe, Target
from thesean.distill.align import Aligner
from thesean.errors import (
    CaptureError,
    DataError,
    NumericalError,
    PlanError,
    TargetMismatchError,
    UnknownNameError,
    WriteError,
)
from thesean.recipe import Alignment


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
    with pytest.raises(CaptureError, match=r"test_bad_input\.py, line \d+, in forward: if x\.sum\(\) > 0"):
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
