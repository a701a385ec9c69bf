from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean.journal
from tests import captured, models
from tests.distill.tools import batches_of, drafted, recipe, task, training
from thesean.distill.hold_out import READ_ONCE
from thesean.distill.stages import align, tune
from thesean.distill.stream import Stream
from thesean.errors import DataError, ResumeError, WriteError
from thesean.journal import Interrupted, Journal, journal_in, stoppable


class Box:
    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


at_work: list[Journal] = []


def opened(folder: Path | None, resume: Any = "auto", **facts: str) -> Journal:
    """As another process would, once those before it are gone."""
    while at_work:
        at_work.pop().close()
    at_work.append(Journal(folder))
    at_work[0].open(lambda: facts, resume)
    return at_work[0]


@pytest.fixture
def always_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each step."""
    monkeypatch.setattr(thesean.journal, "_AT_LEAST_S", 0.0)
    monkeypatch.setattr(thesean.journal, "_SHARE", 1e9)


def test_a_finished_piece_is_not_computed_again(tmp_path: Path):
    box, calls = Box(), []

    def compute() -> list[Any]:
        calls.append(1)
        box.value = {"a": torch.arange(3), 1: (2.5, None, "text", [True])}
        return [float("inf"), "value"]

    for _ in range(2):
        box.value = None
        journal = opened(tmp_path, guide="one")
        assert journal.piece("first", compute, box) == [float("inf"), "value"]
        assert torch.equal(box.value.pop("a"), torch.arange(3))
        assert box.value == {1: (2.5, None, "text", [True])}
    assert calls == [1]


def test_what_a_piece_was_made_of_goes_when_it_is_whole(tmp_path: Path):
    journal = opened(tmp_path)

    def outer() -> None:
        journal.piece("inner", lambda: None)
        journal.piece("other", lambda: None)
        assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
            "outer.inner.safetensors",
            "outer.other.safetensors",
        ]

    journal.piece("outer", outer)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["outer.safetensors"]


def test_tensors_that_are_one_stay_one_and_views_are_copied(tmp_path: Path):
    whole, box = torch.arange(12.0).view(3, 4), Box()
    box.value = {"a": whole, "b": whole, "column": whole[:, 1], "empty": torch.zeros(0), "none": torch.zeros(0, 2)}
    opened(tmp_path).piece("x", lambda: None, box)
    kept, box.value = box.value, None
    opened(tmp_path).piece("x", pytest.fail, box)
    assert box.value["a"] is box.value["b"]
    assert all(torch.equal(box.value[k], v) for k, v in kept.items())


@pytest.mark.parametrize(("resume", "begins"), [("auto", True), ("never", True), ("must", False)])
def test_another_run_is_told_and_begun_anew_or_refused(tmp_path: Path, resume, begins):
    opened(tmp_path, guide="one", data="same").piece("x", lambda: 1)
    if not begins:
        with pytest.raises(ResumeError, match="no run to continue: what it is of has changed: guide"):
            opened(tmp_path, resume, guide="two", data="same")
        return
    if resume == "auto":
        with pytest.warns(UserWarning, match="begun anew: what it is of has changed: guide"):
            journal = opened(tmp_path, resume, guide="two", data="same")
    else:
        journal = opened(tmp_path, resume, guide="one", data="same")
    assert journal.piece("x", lambda: 2) == 2


def test_must_needs_a_run(tmp_path: Path):
    with pytest.raises(ResumeError, match="nothing was begun there"):
        opened(tmp_path, "must")
    with pytest.raises(ResumeError, match="needs the workdir="):
        Journal().open(dict, "must")


def test_without_a_folder_nothing_is_kept():
    journal, box = journal_in(None), Box()
    assert journal.piece("x", lambda: journal.resumed(box)) == 0
    journal.after_step(1, box)
    journal.clear()


def steps(journal: Journal, box: Box, count: int = 6, stop_at: int | None = None) -> int:
    def compute() -> int:
        first = journal.resumed(box)
        for step in range(first, count):
            box.value += step
            if step + 1 == stop_at:
                journal.stopping = 2
            journal.after_step(step + 1, box)
        return first

    return journal.piece("steps", compute, box)


def test_a_piece_under_way_goes_on_where_it_was_asked_to_stop(tmp_path: Path):
    journal, box = opened(tmp_path), Box(0)
    with pytest.raises(Interrupted, match=r"stopped after step 4\. The same call goes on from there"):
        steps(journal, box, stop_at=4)
    journal, box = opened(tmp_path), Box("anything")
    assert steps(journal, box) == 4
    assert box.value == sum(range(6))
    assert journal.told == ["went on at step 4 of steps"]


def test_the_last_two_checkpoints_are_kept_and_a_torn_one_is_told(tmp_path: Path, always_written):
    with pytest.raises(Interrupted):
        steps(opened(tmp_path), Box(0), stop_at=4)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == ["steps@3.safetensors", "steps@4.safetensors"]
    torn = tmp_path / names[-1]
    torn.write_bytes(torn.read_bytes()[:-7])
    box = Box("anything")
    with pytest.warns(UserWarning, match=r"steps@4\.safetensors can't be read .* an earlier state serves"):
        assert steps(opened(tmp_path), box) == 3
    assert box.value == sum(range(6))


def test_a_full_disk_is_told_once_and_costs_no_run(tmp_path: Path, always_written, monkeypatch: pytest.MonkeyPatch):
    journal, box = opened(tmp_path), Box(0)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(thesean.journal, "save_file", full)
    with pytest.warns(UserWarning, match="no checkpoint was kept: .*No space left") as told:
        steps(journal, box)
    assert len(told) == 1
    assert box.value == sum(range(6))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 9, "facts": {}}'])
def test_a_run_file_that_is_none_is_another_run(tmp_path: Path, text):
    opened(tmp_path, guide="one").piece("x", lambda: 1)
    (tmp_path / "run.json").write_text(text)
    with pytest.warns(UserWarning, match="begun anew"):
        assert opened(tmp_path, guide="one").piece("x", lambda: 2) == 2
    assert json.loads((tmp_path / "run.json").read_text())["facts"] == {"guide": "one"}


# the place in the data


class Shuffled:
    """In another order each pass, as torch's random state has it."""

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter([(k, {"x": torch.tensor([k])}) for k in torch.randperm(self.count).tolist()])


@pytest.mark.parametrize("read", [0, 1, 4, 5, 6, 12])
def test_a_stream_goes_on_at_its_place_in_a_shuffled_pass(read):
    torch.manual_seed(0)
    stream = Stream(Shuffled())
    for _ in range(read):
        next(stream)
    state, drawn = stream.state_dict(), torch.get_rng_state()
    after = [next(stream)[0] for _ in range(9)]
    torch.manual_seed(1)
    again = Stream(Shuffled())
    again.load_state_dict(state)
    assert again.state_dict()["place"] == state["place"]
    torch.set_rng_state(drawn)
    assert [next(again)[0] for _ in range(9)] == after


def test_a_stream_whose_order_nobody_can_repeat_is_refused():
    orders = iter([[0, 1, 2], [2, 1, 0]])
    stream = Stream(
        type("Own", (), {"__iter__": lambda self: iter([(k, {"x": torch.tensor([k])}) for k in next(orders)])})()
    )
    next(stream)
    stream.load_state_dict(stream.state_dict())
    with pytest.raises(ResumeError, match="doesn't come in the order"):
        next(stream)


def test_a_stream_that_ran_dry_is_told():
    with pytest.raises(DataError, match=READ_ONCE[:40]):
        next(Stream([]))


# whole runs


class Killed(BaseException):
    """As sudden as a signal: nothing below catches it."""


def converted(folder: Path | None, schedule: str, kill_after: int | None = None) -> tuple[Any, list[str], int]:
    """A conversion that is killed after so many writes of its journal, or steps; how many there were."""
    guide = captured.mlp()
    settings = recipe(90, schedule, share=0.1, check_every=2, learning_rate="find")
    told = training(guide, task(output="softmax"), settings, batches=list(batches_of(guide, 5)))
    journal = opened(folder, schedule=schedule)
    object.__setattr__(told, "journal", journal)
    writes, write = 0, journal._write

    def counted(name: str, what: Any) -> bool:
        nonlocal writes
        if writes == kill_after:
            raise Killed
        writes += 1
        return write(name, what)

    journal._write = counted  # type: ignore[method-assign]
    bound_plan, hybrid = drafted(guide)
    torch.manual_seed(5)
    conversion = tune(told, align(bound_plan, hybrid, told))
    return conversion, journal.told, writes


@pytest.mark.parametrize("schedule", ["independent", "progressive", "none"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(tmp_path: Path, schedule, always_written):
    whole, _, _ = converted(None, schedule)
    unbroken, told, writes = converted(tmp_path / "unbroken", schedule)
    state = whole.hybrid.graph_module.state_dict()
    assert models.same_state(unbroken.hybrid.graph_module, state)
    assert told == []
    assert writes > 90
    for kill_after in range(0, writes, 31):
        folder = tmp_path / str(kill_after)
        with pytest.raises(Killed):
            converted(folder, schedule, kill_after)
        resumed, _, left = converted(folder, schedule)
        assert models.same_state(resumed.hybrid.graph_module, state)
        assert left <= writes - kill_after + 1  # it went on, and did not begin anew
        assert resumed.final == whole.final
        assert resumed.curves == whole.curves
        assert [s.evaluation for s in resumed.snapshots] == [s.evaluation for s in whole.snapshots]


def test_a_finished_run_is_read_and_not_computed(tmp_path: Path):
    first, _, _ = converted(tmp_path, "independent")
    again, _, writes = converted(tmp_path, "independent")
    assert writes == 0
    assert models.same_state(again.hybrid.graph_module, first.hybrid.graph_module.state_dict())


def refused(folder: Path, resume: Any = "auto", keep: bool = False) -> None:
    """A run in the folder, which may keep a piece and then fails."""
    journal = journal_in(folder)
    with stoppable(journal):
        journal.open(lambda: {"guide": "a"}, resume)
        if keep:
            journal.piece("solve", lambda: 1)
        raise WriteError("no room")


def test_a_run_that_is_refused_before_there_was_anything_to_keep_leaves_nothing(tmp_path: Path):
    with pytest.raises(WriteError, match="no room"):
        refused(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    for again in ({"keep": True}, {"resume": "must"}):  # nor does a later one take what an earlier one kept
        with pytest.raises(WriteError, match="no room"):
            refused(tmp_path, **again)
        assert journal_in(tmp_path).piece("solve", lambda: 2) == 1
