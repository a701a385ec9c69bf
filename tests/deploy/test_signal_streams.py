"""Files of networks that read signals: time in any dimension, one row at a time, convolutions that look both ways.

B batch, C channels, T time
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import thesean
from tests import models
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.errors import ExportError
from thesean.judged import run_as
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan

TIME_LAST = {"input": {0: "batch", 2: "time"}}
CHUNKS = (7, 1, 12, 20)


def tagger() -> nn.Module:
    """x_BCT -> y_BCT, 2 + 4 steps ahead."""
    torch.manual_seed(0)
    first, second = nn.Conv1d(4, 12, 5, padding=2), nn.Conv1d(12, 12, 5, padding="same", dilation=2)
    return nn.Sequential(first, nn.BatchNorm1d(12), nn.ReLU(), second, nn.ReLU(), nn.Conv1d(12, 3, 1)).eval()


@pytest.fixture(scope="module", params=["keep", "narrow"])
def signals(request, tmp_path_factory) -> tuple[Any, Session]:
    """A network and its file, that comes six steps late."""
    guide = capture(tagger(), models.vectors(3, 4, 24), dynamic=TIME_LAST)
    torch.manual_seed(0)
    module = build_hybrid(make_plan(guide, request.param)).graph_module.eval()
    path = tmp_path_factory.mktemp("signals") / "m.onnx"
    report = export(module, guide.signature, path, stateful=True)
    assert report.delay == 6
    return module, Session(path)


@torch.no_grad()
def test_a_stream_of_what_has_time_last_is_the_network_in_its_place(signals):
    module, session = signals
    x = models.vectors(2, 4, 40)
    stream = session.stream()
    pieces = [stream({"input": piece.numpy()}) for piece in x.split(CHUNKS, 2)]
    pieces.append(stream.end())
    got = np.concatenate([piece["output"] for piece in pieces], 2)
    np.testing.assert_allclose(got, module(x).numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_late_file_that_is_judged_is_put_in_its_place(signals):
    module, session = signals
    x = models.vectors(2, 4, 40)
    torch.testing.assert_close(run_as(x, session, {"input": x}), module(x), rtol=1e-4, atol=1e-5)


def test_where_nothing_is_asked_what_looks_ahead_has_no_state(tmp_path):
    guide = capture(tagger(), models.vectors(3, 4, 24), dynamic=TIME_LAST)
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert not report.delay
    assert report.note.startswith("without state: ")


class Normed(nn.Module):
    """By all steps, behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(input)).relu()


def test_what_mixes_steps_beside_convolutions_is_named(tmp_path):
    guide = capture(models.seeded(Normed), models.vectors(3, 4, 24), dynamic=TIME_LAST)
    with pytest.raises(ExportError, match=r"norm \(aten\.group_norm\.default\) mixes time outside"):
        export(guide.graph_module, guide.signature, tmp_path / "m.onnx", stateful=True)


class OneRow(nn.Module):
    """x_1TC -> y_1CT, with a state that was made for one row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cell, self.last = (
            nn.Conv1d(4, 8, 3, padding=2),
            nn.LSTM(8, 8, 2, batch_first=True),
            nn.Linear(8, 3),
        )
        self.register_buffer("start", torch.zeros(2, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.mT)[..., :-2].mT
        return self.last(self.cell(x, (self.start, self.start))[0]).mT


@pytest.fixture(scope="module", params=["keep", "rnn"])
def one_row(request) -> thesean.Converted:
    batches = [models.vectors(1, 24, 4, seed=seed) for seed in range(6)]
    return thesean.compile(models.seeded(OneRow), request.param, data=batches, recipe="fast", progress=False)


@torch.no_grad()
def test_a_guide_of_one_row_is_a_stream_of_one_row(one_row, tmp_path):
    report = one_row.export(tmp_path / "m.onnx")
    assert report.stateful
    assert not [note for note in report.note.split("; ") if "start them together" in note]
    session = Session(report.path)
    assert {session.shape(name)[0] for name in session.states} == {1}
    x, state, got = models.vectors(1, 40, 4), None, []
    for piece in x.split(CHUNKS, 1):
        found, state = session.run({"x": piece.numpy()}, state)
        got.append(found["output"])
    np.testing.assert_allclose(np.concatenate(got, 2), one_row(x).numpy(), rtol=1e-4, atol=1e-5)


def test_whole_numbers_of_a_file_whose_outputs_have_time_last_are_judged_in_chunks_too(one_row, tmp_path):
    report = one_row.export(tmp_path / "m.onnx", quantize="int8")
    assert report.quantized is not None
    assert report.quantized.apart is not None
    assert report.quantized.apart < 0.05  # activations have one scale a call
