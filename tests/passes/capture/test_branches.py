"""B batch, T time, D width"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests.captured import KERNELS
from tests.models import VOCABULARY, bert, seeded, tokens, vectors
from thesean.deploy.describe_file import describe_file
from thesean.deploy.session import Session
from thesean.errors import CaptureError, DataError, ExportError
from thesean.passes.capture import branches
from thesean.passes.capture.capture import capture
from thesean.passes.graph.signature import Bound

Rule = Callable[[Any, torch.Tensor], torch.Tensor]

_SIZES = [(1, 1), (3, 1), (2, 3), (1, 12), (3, 12), (2, 13), (3, 16), (2, 17), (9, 12), (8, 9), (2, 40)]


class Sized(nn.Module):
    """y = rule(linear(x)), and a table of 16 positions."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.rule = rule
        self.table = torch.randn(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(self, self.layer(x))


def _grown(model: Sized, h: torch.Tensor) -> torch.Tensor:
    if h.shape[1] > model.table.shape[0]:
        model.table = torch.cat([model.table, model.table.flip(0)])
    return h + model.table[: h.shape[1]]


def _asserted(model: Sized, h: torch.Tensor) -> torch.Tensor:
    assert h.shape[1] <= 16
    return h + model.table[: h.shape[1]]


def _last_of_many(_: Sized, h: torch.Tensor) -> torch.Tensor:
    """Long ones are cut, which changes nothing until they are twice as long as the branch says."""
    if h.shape[1] > 16:
        h = h[:, -32:]
    return h - h.mean(1, keepdim=True)


def _pairs(_: Sized, h: torch.Tensor) -> torch.Tensor:
    if h.shape[1] % 4:
        h = nn.functional.pad(h, (0, 0, 0, 4 - h.shape[1] % 4))
    h = h.unflatten(1, (-1, 4))
    return (h + h.mean(2, keepdim=True)).flatten(1, 2)


def _loop(_: Sized, h: torch.Tensor) -> torch.Tensor:
    steps, state = [], torch.zeros_like(h[:, 0])
    for t in range(h.shape[1]):
        state = state * 0.5 + h[:, t]
        steps.append(state)
    return torch.stack(steps, 1)


def _unseen(at: int) -> Rule:
    """A branch that the trace sees, and at one size on this side of it one that it doesn't."""

    def rule(_: Sized, h: torch.Tensor) -> torch.Tensor:
        if h.shape[1] > 30:
            return h * 2
        return h if torch.compiler.is_exporting() or h.shape[1] != at else -h

    return rule


FREE, FIXED = ("batch", "time", 8), ("batch", 12, 8)

# what the guide's code asks of sizes, and what becomes of the dimensions at an example of (3, 12)
RULES: dict[str, tuple[Rule, tuple[int | str, ...], tuple[Bound, ...]]] = {
    "no more than": (lambda _, h: h * 2 if h.shape[1] > 16 else h, FREE, (Bound(name="time", most=16),)),
    "no fewer than": (lambda _, h: h * 2 if h.shape[1] < 4 else h, FREE, (Bound(name="time", least=4),)),
    "a stretch": (lambda _, h: h * (h.shape[1] // 5), FREE, ()),
    "between": (lambda _, h: h if 10 <= h.shape[1] < 15 else -h, FREE, (Bound(name="time", least=10, most=14),)),
    "even": (lambda _, h: h * 2 if h.shape[1] % 2 == 0 else h, FIXED, ()),
    "equal": (lambda _, h: h * 2 if h.shape[1] == 12 else h, FIXED, ()),
    "one step": (lambda _, h: h * 2 if h.shape[1] == 1 else h, FREE, (Bound(name="time", least=2),)),
    "one row": (lambda _, h: h * 2 if h.shape[0] == 1 else h, FREE, (Bound(name="batch", least=2),)),
    "few rows": (lambda _, h: h * 2 if h.shape[0] > 8 else h, FREE, (Bound(name="batch", most=8),)),
    "both": (lambda _, h: h * 2 if h.shape[0] * h.shape[1] > 64 else h, FIXED, (Bound(name="batch", most=5),)),
    "a table that grows": (_grown, FREE, (Bound(name="time", most=16),)),
    "long ones are cut": (_last_of_many, FREE, (Bound(name="time", most=16),)),
    "split": (lambda _, h: torch.cat([c - c.mean(1, keepdim=True) for c in h.split(4, 1)], 1), FIXED, ()),
    "padded if need be": (_pairs, FIXED, ()),
    "padded": (lambda _, h: nn.functional.pad(h, (0, 0, 0, -h.shape[1] % 4)).unflatten(1, (-1, 4)), FREE, ()),
    "a number": (lambda _, h: h / math.sqrt(h.shape[1]), FIXED, ()),
    "a power": (lambda _, h: h / h.shape[1] ** 0.5, FREE, ()),
    "a loop": (_loop, FIXED, ()),
    "at most some": (lambda _, h: h - h[:, : min(h.shape[1], 10)].mean(1, keepdim=True), FREE, ()),
    "at least some": (lambda _, h: h * max(h.shape[1], 16), FREE, ()),
    "an assertion": (_asserted, FREE, ()),
    "unseen beside the example": (_unseen(13), FIXED, ()),
    "unseen at twice the example": (_unseen(25), FIXED, ()),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_at_every_size_the_graph_gives_the_guides_numbers_or_is_refused(rule):
    asked, shape, bounds = RULES[rule]
    guide = Sized(asked)
    captured = capture(guide, vectors(3, 12, 8))
    assert (captured.signature.inputs[0].shape, captured.signature.bounds) == (shape, bounds)
    assert bool(captured.notes) == (shape != FREE or bool(bounds))
    ran = 0
    for batch, time in _SIZES:
        x_BTD = vectors(batch, time, 8, seed=1)
        fits = all(isinstance(d, str) or d == n for d, n in zip(shape, x_BTD.shape, strict=True))
        if not (fits and captured.signature.fits({"batch": batch, "time": time})):
            with pytest.raises(DataError):
                captured.signature.check({"x": x_BTD})
            continue
        if rule == "an assertion" and time > 16:  # nor does the guide run
            continue
        found = captured.graph_module(x_BTD)
        torch.testing.assert_close(found, copy.deepcopy(guide)(x_BTD))
        ran += 1
    assert ran >= (2 if shape != FREE or bounds else 5)


def test_the_other_side_of_a_branch_comes_with_an_example_of_its_own():
    guide = Sized(RULES["no more than"][0])
    captured = capture(guide, vectors(3, 30, 8))
    assert captured.signature.bounds == (Bound(name="time", least=17),)
    with torch.no_grad():
        torch.testing.assert_close(captured.graph_module(vectors(2, 17, 8)), guide(vectors(2, 17, 8)))
    assert captured.notes[0].startswith("time: 17 or more, other sizes are refused")


def test_a_batch_of_one_that_is_a_case_of_its_own_is_kept_where_it_is_the_example():
    guide = Sized(RULES["one row"][0])
    captured = capture(guide, vectors(1, 6, 8))
    assert captured.signature.inputs[0].shape == (1, "time", 8)
    assert "fixed dimension 0 of x (batch) at 1, the example's" in captured.notes[0]
    with torch.no_grad():
        torch.testing.assert_close(captured.graph_module(vectors(1, 9, 8)), guide(vectors(1, 9, 8)))


def test_a_dimension_that_the_caller_wants_free_is_refused_where_it_must_be_fixed():
    with pytest.raises(CaptureError, match=r"dimension 1 of x \(time\) at 12, the example's.* at 13.*torch.where"):
        capture(Sized(RULES["even"][0]), vectors(3, 12, 8), dynamic={"x": {0: "batch", 1: "time"}})
    free = capture(Sized(RULES["even"][0]), vectors(3, 12, 8), dynamic={"x": {0: "batch"}})
    assert free.signature.inputs[0].shape == FIXED


def test_a_kernel_wants_its_steps_and_what_wants_a_remainder_is_left_free():
    wide = torch.ones(8, 1, 7)
    summed = Sized(lambda _, h: nn.functional.conv1d(h.transpose(1, 2), wide, groups=8).transpose(1, 2))
    kernel = capture(summed, vectors(3, 12, 8))
    assert kernel.signature.bounds == (Bound(name="time", least=7),)
    with pytest.raises(DataError, match="time: expected 7 or more, found 6: the guide computes otherwise"):
        kernel.signature.check({"x": vectors(3, 6, 8)})
    pairs = Sized(lambda _, h: h.reshape(h.shape[0], h.shape[1] // 2, 2, 8).mean(2))
    assert capture(pairs, vectors(3, 12, 8)).signature.bounds == ()


def test_a_guard_too_far_off_to_be_tried_is_taken_at_its_word():
    guide = Sized(lambda _, h: h * 2 if h.shape[1] > 300_000 else h)
    captured = capture(guide, vectors(3, 12, 8))
    assert captured.signature.bounds == (Bound(name="time", most=300_000),)
    assert "its code asks for that" in captured.notes[0]


def test_a_guard_far_off_is_tried_where_the_guide_is_quick():
    cut = Sized(lambda _, h: torch.cat([h[:, :3000], h[:, 3000:]], 1))  # whatever the trace asked, it is the same
    assert capture(cut, vectors(3, 12, 8)).signature.bounds == ()
    branch = Sized(lambda _, h: h * 2 if h.shape[1] > 3000 else h)
    assert capture(branch, vectors(3, 12, 8)).signature.bounds == (Bound(name="time", most=3000),)


@pytest.mark.parametrize("attention", KERNELS)
def test_where_a_table_of_positions_ends_is_no_branch(attention):
    """How positions go on past it is the recipe's to say: the guide doesn't."""
    assert capture(bert(layers=1, attention=attention), tokens(2, 8)).signature.bounds == ()


def test_a_call_outside_of_the_bounds_names_size_and_bounds():
    captured = capture(Sized(RULES["no more than"][0]), vectors(3, 12, 8))
    with pytest.raises(DataError, match="time: expected 1 to 16, found 17: the guide computes otherwise there"):
        captured.signature.check({"x": vectors(2, 17, 8)})


def test_the_guide_is_as_it_was_after_it_was_tried_at_other_sizes():
    guide = Sized(_grown)
    table = guide.table
    capture(guide, vectors(3, 12, 8))
    assert guide.table is table
    assert table.shape == (16, 8)


class Memo(nn.Module):
    """ids_BT -> logits_BTV, causal; long texts are read louder."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        time = ids.shape[1]
        x, mask_TT = self.table(ids), torch.ones(time, time, dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, mask_TT)
        return self.head(x * 2 if time > 16 else x)


def test_bounds_are_in_a_saved_conversion_and_in_a_file_and_refused_there(tmp_path):
    converted = thesean.compile(seeded(Memo), "gru", data=[tokens(4, 12)], recipe="fast", progress=False)
    loaded = thesean.load(converted.save(tmp_path / "saved"))
    assert loaded.signature.bounds == (Bound(name="time", least=1, most=16),)
    assert any(note.startswith("time: 1 to 16, other sizes are refused") for note in loaded.report.notes)
    report = loaded.export(tmp_path / "m.onnx")
    assert not report.stateful
    assert "the guide computes otherwise but for 1 to 16 steps" in report.note
    assert [c.shape for c in report.checks] == [(2, 7), (2, 16), (5, 3), (1, 1), (1, 16)]
    session = Session(report.path)
    assert session.run({"ids": tokens(2, 16).numpy()})[0]["output"].shape == (2, 16, VOCABULARY)
    assert "time: 1 to 16, no others" in describe_file(report.path)[0]
    for call in (converted, loaded, lambda ids: session.run({"ids": ids.numpy()})):
        with pytest.raises(DataError, match=r"expected 1 to 16.*found 17"):
            call(tokens(2, 17))
    with pytest.raises(ExportError, match="a stream has any number"):
        loaded.export(tmp_path / "m.onnx", stateful="yes")


class Remembering(nn.Module):
    """Keeps something from call to call, or makes anew what it keeps."""

    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer, self.keep = nn.Linear(4, 4), keep
        self.calls = self._hidden = 0
        self.seen: list[int] = []
        self.counts, self.inside = {"calls": 0}, SimpleNamespace(calls=0)
        self.sum, self.known = torch.zeros(()), {0}
        self.cache: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.keep(self)
        return self.layer(x) * (1 if factor is None else factor)


def _count(model: Any) -> int:
    model.calls += 1
    return model.calls


def _count_hidden(model: Any) -> int:
    model._hidden += 1
    return 1 if model._hidden < 9 else 2  # what shows is too late for a few calls to show it


def _count_inside(model: Any) -> int:
    model.inside.calls += 1
    return model.inside.calls


def _count_in_a_dict(model: Any) -> int:
    model.counts["calls"] += 1
    return model.counts["calls"]


def _cache(model: Any) -> torch.Tensor:
    if model.cache is None:
        model.cache = torch.arange(4.0)
    return model.cache


def _show(model: Any) -> None:
    model.last = model.layer.weight * 2
    model.shape, model.names = (1, 2), ["a"]


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (_count, "calls"),
        (_count_hidden, "_hidden"),
        (_count_inside, "inside.calls"),
        (_count_in_a_dict, "counts.calls"),
        (lambda m: m.seen.append(1) or len(m.seen), "seen"),
        (lambda m: m.known.add(len(m.known)), "known"),
        (lambda m: setattr(m, "sum", m.sum + 1), "sum"),
        (lambda m: m.sum.add_(1), "sum"),
    ],
)
def test_a_memory_of_calls_is_noted_and_the_guide_forgets_ours(keep, name):
    guide = Remembering(keep)
    captured = capture(guide, vectors(3, 4))
    assert captured.notes[0].startswith(f"the guide keeps {name} from call to call")
    assert (guide.calls, guide._hidden, guide.seen, guide.counts, guide.inside.calls) == (0, 0, [], {"calls": 0}, 0)
    assert (guide.known, float(guide.sum)) == ({0}, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(captured.graph_module(vectors(3, 4)), guide(vectors(3, 4)))


@pytest.mark.parametrize("keep", [_cache, _show])
def test_what_is_made_anew_at_each_call_or_once_is_no_memory(keep):
    guide = Remembering(keep)
    assert capture(guide, vectors(3, 4)).notes == ()
    assert guide.cache is None
    assert not hasattr(guide, "last")


@pytest.mark.parametrize("least", [1, 5, 10, 11, 12])
@pytest.mark.parametrize("most", [12, 13, 14, 15, 16, 47, 100, 10_000, None])
def test_a_guard_breaks_at_the_nearest_size_on_either_side(least, most):
    asked = []

    def holds(sizes: dict[str, int]) -> bool:
        asked.append(sizes["time"])
        return least <= sizes["time"] and (most is None or sizes["time"] <= most)

    around = branches._Around("time", {"time": 12}, [])
    below, above = around.breaks(SimpleNamespace(holds=holds))  # type: ignore[arg-type]
    assert below == (least - 1 or None)
    assert above == (None if most is None else most + 1)
    assert len(asked) < 100


def test_a_length_that_the_guide_takes_in_steps_alone_is_not_free():
    guide = seeded(nn.Linear, 16, 4)
    guide.forward = lambda x: nn.Linear.forward(guide, x.reshape(x.shape[0], -1, 16))  # type: ignore[arg-type]
    with pytest.raises(
        CaptureError, match=r"fixes dimension 1 of x \(time\) at 64.* does not run at \d+\. Leave it out"
    ):
        capture(guide, vectors(4, 64), {"x": {0: "batch", 1: "time"}})
