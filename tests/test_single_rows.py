"""Batches of one row, and guides that take no more.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import models
from tests.convnets import network
from tests.models import vectors
from thesean.deploy.session import Session
from thesean.errors import DataError

FAST: dict[str, Any] = {"recipe": "fast", "progress": False}


@pytest.mark.parametrize("name", ["basic", "gated", "vectors"])
def test_rows_one_by_one_are_judged_as_rows_together(name):
    guide, shape = network(name)
    data = [vectors(8, *shape, seed=k) for k in range(5)]
    alone = [row for batch in data for row in batch.split(1)]
    together, apart = (
        thesean.compile(guide, "narrow", data=data[:3], eval_data=e, **FAST).report.converted["divergence"]
        for e in (data[3:], alone[24:])
    )
    assert apart == pytest.approx(together, rel=0.25)


@pytest.mark.parametrize("name", ["basic", "vectors"])
def test_rows_one_by_one_of_no_sequence_are_too_few_to_align_on_and_told(name):
    guide, shape = network(name)
    data = [vectors(1, *shape, seed=k) for k in range(8)]
    with pytest.raises(DataError, match=r"compares at least 2 examples, and the largest batch has 1. Give larger b"):
        thesean.compile(guide, "narrow", data=data, recipe={"steps": 12, "warmup": 1}, progress=False)


class Encoded(nn.Module):
    """One encoder layer between linear maps: x_BTD -> y_BT3."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 3)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.into(x)))


@pytest.mark.parametrize("dynamic", [{"x": {1: "time"}}, {}])
def test_one_row_is_enough_where_the_batch_is_fixed_by_hand(dynamic, tmp_path):
    guide = models.seeded(Encoded).eval()
    data = [vectors(1, 9, 4, seed=k) for k in range(8)]
    converted = thesean.compile(guide, "rnn", data=data, dynamic=dynamic, **FAST)
    assert converted.plan.parts[0].mixing == "bidirectional"
    assert converted.report.converted["divergence"] < 0.5
    assert converted.export(tmp_path / "m.onnx").checks


class Carrying(nn.Module):
    """Recurrent, from where the last call ended, of one row alone; what it counts is for people to read."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(16, 3)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True)
        self.state = torch.zeros(2, 1, 16), torch.zeros(2, 1, 16)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y, self.state = self.lstm(self.into(x), self.state)
        return {"y": self.out(y), "layers": 2, "named": "lstm"}


def test_a_guide_that_takes_one_row_is_converted_for_one(tmp_path):
    guide = models.seeded(Carrying).eval()
    data = [vectors(1, 9, 4, seed=k) for k in range(8)]
    converted = thesean.compile(guide, "rnn", data=data, **FAST)
    assert "the guide takes one row at a time, and so does what it is converted to" in converted.report.notes
    assert any(note.startswith("the guide keeps state") for note in converted.report.notes)
    longer = vectors(1, 30, 4)
    found = converted(longer)
    assert (found["layers"], found["named"], found["y"].shape) == (2, "lstm", (1, 30, 3))
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    assert loaded(longer)["named"] == "lstm"
    torch.testing.assert_close(loaded(longer)["y"], found["y"])
    converted.export(tmp_path / "m.onnx")
    outputs, _ = Session(tmp_path / "m.onnx").run({"x": longer.numpy()})
    torch.testing.assert_close(torch.as_tensor(outputs["y"]), found["y"], rtol=1e-3, atol=1e-4)


def test_a_guide_that_runs_on_nothing_says_why_it_did_not_run_on_what_was_given():
    with pytest.raises(DataError, match=r"Expected hidden\[0\] size \(2, 3, 16\)"):
        thesean.compile(models.seeded(Carrying).eval(), "rnn", data=[vectors(3, 9, 4)], **FAST)
