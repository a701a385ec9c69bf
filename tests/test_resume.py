"""`compile` in a `workdir`: what was interrupted goes on, and what has changed begins anew."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import thesean
import thesean.journal
from tests import models
from thesean.errors import ResumeError, UnknownNameError
from thesean.journal import Interrupted
from thesean.targets import get_family
from thesean.targets.shared import registry

RECIPE = {"steps": 30, "alignment": {"share": 0.2}, "fine_tuning": {"learning_rate": 1e-3}}

signals: dict[int, int] = {}  # the number of a call of the loss -> what is sent to ourselves then
calls = 0


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored, and a run leaves that as it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def loss(output: Any, batch: Any) -> torch.Tensor:
    global calls
    calls += 1
    if calls in signals:
        os.kill(os.getpid(), signals[calls])
    return F.cross_entropy(output, batch[1])


def batches() -> DataLoader:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :5].argmax(1)), batch_size=8, shuffle=True)


def run(folder: Path | None, after: dict[int, int] | None = None, **changes: Any) -> thesean.Converted:
    global calls
    calls = 0
    given: dict[str, Any] = {"data": batches(), "loss": loss, "recipe": RECIPE, "workdir": folder} | changes
    signals.clear()
    signals.update(after or {})
    return thesean.compile(models.mlp(), given.pop("target", "mlp"), progress=False, **given)


def went_on(converted: thesean.Converted) -> bool:
    return any("went on at step" in note for note in converted.report.notes)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_step_and_the_same_call_goes_on(tmp_path: Path, capsys, number, error):
    whole = run(None)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as told:
        run(tmp_path, {25: number})
    if error is SystemExit:
        assert told.value.code == 143
    assert "The same call goes on from there" in capsys.readouterr().err
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert not (tmp_path / "converted").exists()
    again = run(tmp_path)
    assert went_on(again)
    assert models.same_state(again.module, whole.module.state_dict())
    assert not went_on(run(tmp_path))  # a finished run is read
    assert models.same_state(thesean.load(tmp_path / "converted").module, whole.module.state_dict())


def test_a_second_signal_stops_at_once(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt) as told:
        run(tmp_path, {25: signal.SIGINT, 26: signal.SIGINT})
    assert not isinstance(told.value, Interrupted) or calls == 25


def other_loss(output: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output, batch[1]) + 0.0


def weighed(output: Any, batch: Any, by: float) -> torch.Tensor:
    return by * F.cross_entropy(output, batch[1])


def another(at: int, held_out: bool = False) -> dict[str, Any]:
    """A list of batches, one of which is another one; None of them where `at` is -1."""
    data = [(x + (k == at), x[:, :5].argmax(1)) for k, x in enumerate(torch.eye(8).repeat(8, 1).split(4))]
    return {"data": data, "eval_data": data[:1]}


def loaded(**ways: Any) -> dict[str, Any]:
    return {"data": DataLoader(batches().dataset, **{"batch_size": 8, **ways}), "eval_data": another(-1)["eval_data"]}


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        (
            {"loss": partial(weighed, by=1.0)},
            {"loss": partial(weighed, by=2.0)},
            "what the loss or metric is made with",
        ),
        (another(-1), another(9), "the data"),
        (loaded(), loaded(batch_size=4), "the data"),
        (loaded(), loaded(shuffle=True), "the data"),
        ({**another(-1), "inputs": lambda b: b[0]}, {**another(-1), "inputs": lambda b: 2 * b[0]}, "the data"),
    ],
    ids=["a loss's weight", "a batch in the middle", "the batch size", "the order", "inputs="],
)
def test_what_hides_in_a_loss_or_in_data_has_changed_too(tmp_path: Path, first, then, named):
    fast: dict[str, Any] = {"recipe": "fast"}
    run(tmp_path, **fast, **first)
    run(tmp_path, **fast, **first, resume="must")
    with pytest.raises(ResumeError, match=f"has changed: {named}"):
        run(tmp_path, **fast, **then, resume="must")


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_work(tmp_path: Path):
    def nested(output: Any, batch: Any) -> torch.Tensor:
        if output.requires_grad:
            run(tmp_path, recipe="fast", resume="never")
        return loss(output, batch)

    with pytest.raises(ResumeError, match="this process is at work there"):
        run(tmp_path, loss=nested)
    assert run(tmp_path, resume="never").report.steps == 30


@pytest.mark.parametrize("text", ["[]", '{"format": 1, "facts": []}', '{"format": 0, "facts": {}}'])
def test_a_run_of_another_version_begins_anew(tmp_path: Path, text):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run.json").write_text(text)
    with pytest.raises(ResumeError, match="there is no run to continue"):
        run(tmp_path, recipe="fast", resume="must")
    assert run(tmp_path, recipe="fast").report.steps == 0


def test_a_signal_between_steps_stops_at_once_and_says_how_to_go_on(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as told:
        run(tmp_path, {4: signal.SIGTERM})  # while the guide is judged
    assert told.value.code == 143
    assert "stopped between steps. Nothing was kept: the same call begins anew." in capsys.readouterr().err
    assert run(tmp_path).report.steps == 30


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe": RECIPE | {"steps": 31}}, "the recipe"),
        ({"seed": 1}, "the seed"),
        ({"target": "linear"}, "the plan"),
        ({"keep": ["4..5"]}, "the plan"),
        ({"loss": other_loss}, "the loss or metric"),
        ({"data": [(x, x[:, :5].argmax(1)) for x in torch.eye(8).split(4)]}, "the data"),
    ],
)
def test_what_has_changed_is_named_and_begun_anew_or_refused(tmp_path: Path, changes, named):
    run(tmp_path)
    with pytest.raises(ResumeError, match=f"has changed: .*{named}"):
        run(tmp_path, resume="must", **changes)
    with pytest.warns(UserWarning, match=f"begun anew: what it is of has changed: .*{named}"):
        anew = run(tmp_path, **changes)
    assert models.same_state(anew.module, run(None, **changes).module.state_dict())


def test_a_dataset_of_another_length_is_another_one(tmp_path: Path):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    held_out = [(x[:8], x[:8, :5].argmax(1))]
    for rows in (x, torch.cat([x[:20], x[40:]])):  # of the same ends
        data = DataLoader(TensorDataset(rows, rows[:, :5].argmax(1)), batch_size=4, shuffle=True)
        if rows is x:
            run(tmp_path, data=data, eval_data=held_out)
    with pytest.raises(ResumeError, match=r"has changed: the data\."):
        run(tmp_path, data=data, eval_data=held_out, resume="must")


def test_another_guide_is_another_run(tmp_path: Path):
    run(tmp_path)
    guide = models.mlp()
    with torch.no_grad():
        next(guide.parameters()).mul_(1.5)
    with pytest.warns(UserWarning, match="has changed: the guide"):
        thesean.compile(guide, "mlp", data=batches(), loss=loss, recipe=RECIPE, workdir=tmp_path, progress=False)


def test_a_target_that_was_typed_into_a_notebook_is_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    typed: dict[str, Any] = {"__name__": "typed_in", "Base": get_family("linear").module}
    exec("class TypedIn(Base): ...", typed)
    family = dataclasses.replace(get_family("linear"), name="typed-in", module=typed["TypedIn"])
    monkeypatch.setitem(registry._families, "typed-in", family)
    run(tmp_path, target="typed-in")
    run(tmp_path, target="typed-in", resume="must")


def test_ways_to_resume_are_checked(tmp_path: Path):
    with pytest.raises(UnknownNameError, match="unknown way to resume 'allways'"):
        run(tmp_path, resume="allways")
    with pytest.raises(ResumeError, match="nothing was begun there"):
        run(tmp_path, resume="must")
    with pytest.raises(ResumeError, match="needs the workdir="):
        run(None, resume="must")


def test_auto_finds_its_plan_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params = sum(p.numel() for p in models.mlp().parameters())
    chosen: dict[str, Any] = {
        "target": "auto", "constraints": {"params": params - 1}, "candidates": ["keep", "linear", "identity"]
    }  # fmt: skip
    with pytest.raises(Interrupted):
        stopped_in_fine_tuning(tmp_path, chosen)
    monkeypatch.setattr("thesean.compiler.choose_plans", pytest.fail)
    assert went_on(run(tmp_path, **chosen))


def stopped_in_fine_tuning(folder: Path, chosen: dict[str, Any]) -> None:
    piece = thesean.journal.Journal.piece

    def stopping(self: Any, name: str, compute: Any, *parts: Any) -> Any:
        if name.startswith("fine-tune"):
            self.stopping = signal.SIGINT
        return piece(self, name, compute, *parts)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(thesean.journal.Journal, "piece", stopping)
        run(folder, **chosen)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_every_step_is_a_line_of_json(tmp_path: Path):
    converted = run(tmp_path)
    found = lines(tmp_path)
    steps = [line for line in found if line["event"] == "step"]
    assert len(steps) == converted.report.steps == 30
    assert [line["step"] for line in steps if line["phase"] == "align"] == list(range(1, 7))
    tuned = [line["loss"] for line in steps if line["phase"] == "fine-tune"]
    assert tuned == pytest.approx(converted.report.curves[-1].losses, rel=1e-5)
    assert [line["event"] for line in found].count("begin") == [line["event"] for line in found].count("end")
    run(tmp_path)
    assert lines(tmp_path) == found  # nothing was taken anew


def test_the_lines_of_an_interrupted_run_go_on_and_those_of_another_run_are_its_own(tmp_path: Path):
    with pytest.raises(Interrupted):
        run(tmp_path, {25: signal.SIGINT})
    before = lines(tmp_path)
    run(tmp_path)
    after = lines(tmp_path)
    assert after[: len(before)] == before
    assert len({(line["phase"], line["step"]) for line in after if line["event"] == "step"}) == 30
    run(tmp_path, seed=1, resume="never")
    assert len([line for line in lines(tmp_path) if line["event"] == "step"]) == 30
