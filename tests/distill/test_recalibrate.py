"""Batch norms of parts: their statistics are those of all the data, and a stage keeps them where they do better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.distill.tools import drafted
from thesean.distill.recalibrate import _Moments, batch_norms, recalibrate
from thesean.passes.graph.intermediates import intermediates
from thesean.targets import Target

NORMED = Target("mlp", hidden_norm="batch", width=6)


class Twice(nn.Module):
    """Two norms one after the other, registered the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        nn.init.uniform_(self.first.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def batches(*sizes: int) -> list[dict[str, torch.Tensor]]:
    return [{"input": 3 * models.vectors(size, 8, seed=k) + k} for k, size in enumerate(sizes)]


def test_statistics_are_those_of_all_examples_together_whatever_the_batches():
    _, hybrid = drafted(captured.mlp(), NORMED)
    data = batches(16, 5, 9)
    for part in range(3):
        recalibrate(hybrid, part, data)
    for r in hybrid.replacements:
        (norm,) = batch_norms(hybrid, r.part)
        module = hybrid.module(r)
        assert isinstance(module, nn.Module)
        hybrid.graph_module.eval()
        entry = intermediates(hybrid.graph_module, [r.entry], with_output=False)
        x = torch.cat([entry(**inputs)[r.entry] for inputs in data])
        hidden = module.first[0](x.flatten(1)).double()
        torch.testing.assert_close(norm.running_mean, hidden.mean(0).float())
        torch.testing.assert_close(norm.running_var, hidden.var(0).float())


def test_norms_come_in_the_order_in_which_data_passes_them():
    own = Target("twice", build=lambda part: models.seeded(Twice))
    _, hybrid = drafted(captured.mlp(), own, keep=["2..3", "4..5"])
    data = batches(12, 20)
    recalibrate(hybrid, 0, data)
    module = hybrid.module(hybrid.replacements[0])
    x = torch.cat([inputs["input"] for inputs in data])
    middle = x
    for norm in (module.first, module.second):
        torch.testing.assert_close(norm.running_mean, middle.mean(0))
        torch.testing.assert_close(norm.running_var, middle.var(0))
        middle = torch.tanh(norm.eval()(middle))  # what the second reads is what the first makes of it by then


def test_flags_and_weights_stay():
    _, hybrid = drafted(captured.mlp(), NORMED)
    hybrid.graph_module.train()
    before = {k: v.clone() for k, v in hybrid.graph_module.named_parameters()}
    recalibrate(hybrid, 1, batches(8))
    assert hybrid.graph_module.training
    assert all(torch.equal(v, before[k]) for k, v in hybrid.graph_module.named_parameters())


def convert(target: Any = NORMED, **alignment: Any) -> thesean.Converted:
    data = [3 * models.vectors(16, 8, seed=k) + 2 for k in range(8)]
    recipe = {
        "steps": 20, "warmup": 1, "fine_tuning": {"share": 0},
        "alignment": {"schedule": "sequential", "share": 1.0, "check_every": 2, "learning_rate": 0.03, **alignment},
    }  # fmt: skip
    return thesean.compile(models.mlp(), target, data=data, recipe=recipe, progress=False)


def told(converted: thesean.Converted) -> list[str]:
    return [note for note in converted.report.notes if "batch norm" in note]


def test_a_stage_is_no_worse_than_its_start_and_the_report_tells_each():
    plain, anew = convert(), convert(recalibrate=True)
    assert told(plain) == []
    for note, row in zip(told(anew), anew.report.stages, strict=True):
        assert note.startswith(f"{row.part}: batch norms ")
        assert row.before is not None
        assert row.after <= row.before


class Slow(nn.Module):
    """Its average hardly moves: what is evaluated is far from what was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.BatchNorm1d(8, momentum=1e-4), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(self.norm(x)).relu()


def test_averages_that_are_stale_are_made_good():
    slow = Target("slow", build=lambda part: models.seeded(Slow))
    settings: dict[str, Any] = {"schedule": "joint", "learning_rate": 0.02}
    plain, anew = (convert(slow, recalibrate=flag, **settings) for flag in (False, True))
    assert told(anew) == ["3 parts: batch norms recalibrated over 7 batches"]
    assert anew.report.stages[0].after < 0.9 * plain.report.stages[0].after
    assert anew.report.converted["divergence"] < plain.report.converted["divergence"]


def test_parts_without_a_batch_norm_are_told():
    without = convert(Target("mlp", hidden_norm="layer"), recalibrate=True)
    assert told(without) == ["no part has a batch norm that could be recalibrated"]


@pytest.mark.parametrize("schedule", ["joint", "stochastic"])
def test_at_once_too(schedule):
    assert len(told(convert(recalibrate=True, schedule=schedule))) == 1


def test_moments_of_all_ranks_are_those_of_their_rows_together(monkeypatch):
    x_BC = models.vectors(20, 8) * 3 + 1
    whole, ours, theirs = _Moments(), _Moments(), _Moments()
    whole.add(nn.Identity(), (x_BC,))
    ours.add(nn.Identity(), (x_BC[:13],))
    theirs.add(nn.Identity(), (x_BC[13:],))

    def add_up(tensors: list[torch.Tensor], what: str) -> None:
        """As if the other rank had come to the same place."""
        if len(tensors) == 2:
            tensors[0] += theirs.count
            tensors[1] += theirs.mean_C * theirs.count
        else:
            tensors[0] += theirs.squares_C + (theirs.mean_C - ours.mean_C).square() * theirs.count

    monkeypatch.setattr("thesean.distill.recalibrate.ranks.count", lambda: 2)
    monkeypatch.setattr("thesean.distill.recalibrate.exchange.add_up", add_up)
    ours.everyone()
    assert ours.count == whole.count
    torch.testing.assert_close(ours.mean_C, whole.mean_C)
    torch.testing.assert_close(ours.squares_C, whole.squares_C)
