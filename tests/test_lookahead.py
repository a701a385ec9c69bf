"""A guide that reads both ways becomes a stream that reads some steps ahead: from the plan to the file.

B batch, T time
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.exported import hybrid
from tests.targets.contract import stateful_modules
from thesean import Target
from thesean.deploy import rehearse
from thesean.deploy.describe_file import describe_file
from thesean.deploy.export import export
from thesean.deploy.export_passes import for_export
from thesean.deploy.rehearse import unstreamable
from thesean.deploy.session import Session
from thesean.errors import ExportError, PlanError, TargetMismatchError
from thesean.targets.shared.sequence import SequenceTarget

AHEAD = 2


def batches(count: int = 8) -> list[dict[str, torch.Tensor]]:
    mask_BT = torch.ones(4, models.LENGTH, dtype=torch.long)
    return [{"input_ids": models.tokens(seed=i), "attention_mask": mask_BT} for i in range(count)]


@pytest.fixture(scope="module")
def converted() -> thesean.Converted:
    torch.manual_seed(0)
    return thesean.compile(models.bert(), Target("rnn", lookahead=AHEAD), data=batches(), recipe="fast", progress=False)


@torch.no_grad()
def test_an_output_knows_as_many_steps_past_its_own_as_the_parts_come_to(converted):
    assert any(f"lookahead= comes to {2 * AHEAD} steps in a row" in note for note in converted.plan.notes)
    first = batches(1)[0]
    before_BTD = converted(**first)["last_hidden_state"]
    for step in (6, 9):
        moved = {**first, "input_ids": first["input_ids"].clone()}
        moved["input_ids"][:, step] = (moved["input_ids"][:, step] + 1) % models.VOCABULARY
        change_T = (converted(**moved)["last_hidden_state"] - before_BTD).abs().amax((0, 2))
        assert not change_T[: step - 2 * AHEAD].any()
        assert (change_T[step - 2 * AHEAD : step + 1] > 0).all()


@torch.no_grad()
def test_it_is_saved_and_loaded_as_it_is(converted, tmp_path):
    converted.save(tmp_path / "saved")
    loaded = thesean.load(tmp_path / "saved")
    (first,) = batches(1)
    torch.testing.assert_close(
        loaded(**first)["last_hidden_state"], converted(**first)["last_hidden_state"], rtol=0, atol=0
    )
    ahead = [m.lookahead for m in loaded.module.modules() if hasattr(m, "lookahead")]
    assert ahead == [AHEAD, AHEAD]


@pytest.mark.thorough
def test_the_file_is_a_stream_that_is_late_and_says_so(converted, tmp_path):
    pytest.importorskip("onnxscript")
    report = converted.export(tmp_path / "m.onnx")
    assert (report.stateful, report.delay) == (True, 2 * AHEAD)
    assert f"outputs come {2 * AHEAD} steps late" in str(report)
    assert report.inputs[:3] == ("input_ids", "attention_mask", "seen")
    told, metadata = describe_file(report.path)
    assert f"outputs come {2 * AHEAD} steps late" in told
    assert json.loads(metadata["thesean.delay"]) == {"steps": 2 * AHEAD, "seen": "seen"}
    assert converted.export(tmp_path / "whole.onnx", stateful=False).delay == 0
    session, first = Session(report.path), {k: v.numpy() for k, v in batches(1)[0].items()}
    with torch.no_grad():
        whole = converted(**batches(1)[0])["last_hidden_state"].numpy()
    state, pieces = None, []
    for chunk in np.split(np.arange(models.LENGTH), [1, 2, 7]):
        outputs, state = session.run({k: v[:, chunk] for k, v in first.items()}, state)
        pieces.append(outputs["last_hidden_state"])
    assert state is not None
    last, _ = session.flush(first, state)
    late = np.concatenate([*pieces, last["last_hidden_state"]], 1)
    np.testing.assert_allclose(late[:, 2 * AHEAD :], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("stateful", [True, False])
def test_every_family_is_written_into_one_file(stateful, tmp_path):
    """The export itself compares with torch in chunks and on padded batches."""
    pytest.importorskip("onnxscript")
    families = stateful_modules()
    guide = captured.bert(layers=len(families))
    module = hybrid(guide, {f"*.{k}": Target(name, lookahead=1) for k, name in enumerate(families)})
    with torch.no_grad():  # untrained ones barely speak
        for name, part in module.named_children():
            if name.startswith("part_"):
                nn.init.normal_(part.last.weight, std=0.3)  # type: ignore[arg-type]
    report = export(module, guide.signature, tmp_path / "m.onnx", stateful=stateful)
    assert report.delay == (len(families) if stateful else 0)


@pytest.mark.parametrize(
    "target", [Target("conv", kernel=24), Target("conv", lookahead=20), Target("gru", lookahead=20)]
)
def test_long_windows_are_computed_in_half_precision_too(target):
    """torch's own depthwise convolution in float16 doesn't come back."""
    module = hybrid(captured.bert(), target).part_0
    x_BTD = models.vectors(2, 30, 16)
    with torch.no_grad():
        wide, half = module(x_BTD), module.half()(x_BTD.half())
    wide, half = (y[0] if isinstance(y, tuple) else y for y in (wide, half))
    torch.testing.assert_close(half.float(), wide, rtol=1e-2, atol=1e-2)


def test_what_is_rehearsed_is_all_that_a_stream_is_made_by(monkeypatch):
    guide = captured.bert()
    ran: list[str] = []
    monkeypatch.setattr(rehearse, "run_passes", lambda graph_module, *passes: ran.extend(p.name for p in passes))
    assert unstreamable(hybrid(guide, Target("gru", lookahead=AHEAD)), guide.signature) == ""
    names = [p.name for p in for_export(guide.signature, (), stateful=True)]
    assert ran == names[: names.index("thread-state") + 1]


def test_what_keeps_a_network_from_being_a_stream_is_told_before_anything_trains():
    guide = captured.bert()
    mixed: dict[str, str | Target] = {"*.0": Target("gru", lookahead=AHEAD), "*.1": "keep"}
    told = unstreamable(hybrid(guide, mixed), guide.signature)
    assert told.startswith("parts look ahead, and the network is no stream all the same: ")
    assert "encoder.layer.1.attention" in told
    for target in (Target("gru", lookahead=AHEAD), Target("gru", causal=True)):
        assert unstreamable(hybrid(guide, target), guide.signature) == ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = thesean.compile(models.bert(), mixed, data=batches(2), recipe="fast", progress=False)
    assert any("the network is no stream all the same" in str(w.message) for w in caught)
    assert any("the network is no stream all the same" in note for note in found.report.notes)


@pytest.mark.thorough
def test_a_stateful_file_of_such_a_network_is_refused_by_the_part_that_is_in_the_way(tmp_path: Path):
    pytest.importorskip("onnxscript")
    guide = captured.bert()
    module = hybrid(guide, {"*.0": Target("gru", lookahead=AHEAD), "*.1": "keep"})
    with pytest.raises(ExportError, match=r"a stateful export is not possible: .*encoder\.layer\.1\.attention"):
        export(module, guide.signature, tmp_path / "no.onnx", stateful=True)
    assert export(module, guide.signature, tmp_path / "m.onnx").note.startswith("without state: encoder.layer.1")


def test_a_look_ahead_is_a_whole_number_of_steps():
    for wrong in (-1, 1.5):
        with pytest.raises((TargetMismatchError, PlanError), match="option 'lookahead'"):
            thesean.plan(models.bert(), Target("gru", lookahead=wrong), example_inputs=batches(1)[0])


def test_a_family_of_ones_own_that_can_not_look_ahead_says_so():
    class Plain(SequenceTarget):
        family = "plain"

    with pytest.raises(ValueError, match="lookahead=2 for a module of a family that can't look ahead"):
        Plain(width_in=4, width_out=4, lookahead=2)
    assert Plain(width_in=4, width_out=4).config().get("lookahead") is None
