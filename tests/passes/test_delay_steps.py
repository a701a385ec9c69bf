"""A stream whose parts look ahead gives, late, what the whole sequence gives.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.passes.contract import Example
from tests.targets.contract import stateful_modules
from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import join, run_in_chunks
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.delay_steps import DelaySteps
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import SEEN, delay_of, flushed, in_time
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import TargetSpec, make_plan
from thesean.passes.thread_state import ThreadState, zero_states
from thesean.targets import Target

TIME = 11


def converted(guide: Captured, target: TargetSpec, **division: Any) -> tuple[fx.GraphModule, Signature]:
    torch.manual_seed(0)
    return build_hybrid(make_plan(guide, target, **division)).graph_module.eval(), guide.signature


def bert_inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    """A row that is padded on the right, one on the left, and a whole one."""
    mask_BT = torch.ones(batch, TIME, dtype=torch.long)
    mask_BT[0, 7:], mask_BT[1, :3] = 0, 0
    return {"input_ids": models.tokens(batch, TIME), "attention_mask": mask_BT}


@torch.no_grad()
def assert_a_late_stream(
    graph_module: fx.GraphModule, signature: Signature, inputs: dict[str, torch.Tensor], steps: int
) -> None:
    """At the steps that hold a token, in any chunks."""
    delayed = DelaySteps(signature)(graph_module).graph_module
    assert delay_of(delayed) == steps
    threaded = ThreadState(signature)(delayed).graph_module
    stream = delayed.meta["stream"]
    late, wanted = flushed(stream, inputs, steps), leaf_values(graph_module(**inputs))
    shown_BT = inputs.get("attention_mask", torch.ones(next(iter(inputs.values())).shape[:2])).bool()
    for chunks in ((1,) * (TIME + steps), (3, 1, 7, steps), (TIME + steps,)):
        pieces, _ = run_in_chunks(threaded, stream, late, zero_states(threaded, len(shown_BT)), chunks)
        for index, want in enumerate(wanted):
            joined = join([piece[index] for piece in pieces], want.shape, steps)
            assert isinstance(joined, torch.Tensor), joined
            got = in_time(joined, want.shape, steps)
            torch.testing.assert_close(got[shown_BT], want[shown_BT], rtol=1e-4, atol=1e-5)


def test_the_graph_before_and_after():
    guide = capture(Residual().eval(), models.vectors(2, 5, 4))
    stateless, signature = converted(guide, {"inner": Target("elman", lookahead=2)})
    assert text(stateless.graph) == [
        "x = placeholder x",
        "part_0 = part_0(x)",
        "getitem = getitem(part_0, 0)",
        "add = aten.add.Tensor(x, getitem)",
        "return add",
    ]
    delayed = DelaySteps(signature)(stateless).graph_module
    assert text(delayed.graph) == [
        "x = placeholder x",
        "seen = placeholder seen",
        "delay_2_2 = delay_2_2(x)",
        "getitem_1 = getitem(delay_2_2, 0)",
        "part_0 = part_0_stream(x, mask=seen)",
        "getitem = getitem(part_0, 0)",
        "add = aten.add.Tensor(getitem_1, getitem)",
        "return add",
    ]
    assert delay_of(delayed) == 2
    assert [s.name for s in delayed.meta["stream"].inputs] == ["x", SEEN]


class Residual(nn.Module):
    """x + what reads both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Averaged()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Averaged(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.cell = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x)[0])


# a cell, and a core with two states, while one works
EVERY = [n if n in ("gru", "ssm") else pytest.param(n, marks=pytest.mark.thorough) for n in stateful_modules()]


@pytest.mark.parametrize("target", EVERY)
def test_parts_in_a_row_add_up_and_padded_rows_are_what_they_are(target):
    stateless, signature = converted(captured.bert(), Target(target, lookahead=2))
    assert_a_late_stream(stateless, signature, bert_inputs(), 4)


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ({"*.0": Target("conv", lookahead=3), "*.1": Target("ssm", causal=True)}, 3),
        ({"*.0": Target("gru", causal=True), "*.1": Target("mingru", lookahead=1)}, 1),
        (Target("gru", scope="part", lookahead=2), 4),
        (Target("linear-attention", window=2, sinks=1, lookahead=3), 6),
    ],
    ids=str,
)
def test_parts_that_look_ahead_stand_beside_causal_ones_whole_blocks_and_windows(target, steps):
    stateless, signature = converted(captured.bert(), target)
    assert_a_late_stream(stateless, signature, bert_inputs(), steps)


class Tagger(nn.Module):
    """ids_BT -> two outputs that pass by different numbers of bidirectional layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.first, self.second = Averaged(8), Averaged(8)
        self.early, self.late = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(ids)
        y = self.first(x)
        return {"early": self.early(x + y), "late": self.late(y + self.second(y) * x)}


def test_outputs_that_know_less_wait_for_those_that_know_more():
    guide = capture(models.seeded(Tagger).eval(), {"ids": torch.randint(0, 20, (2, TIME))})
    target = {"first": Target("gru", lookahead=1), "second": Target("lstm", lookahead=3)}
    stateless, signature = converted(guide, target, parts=list(target))
    assert_a_late_stream(stateless, signature, {"ids": torch.randint(0, 20, (3, TIME))}, 4)


def test_an_input_that_is_called_so_already_keeps_its_name():
    class Named(Residual):
        def forward(self, seen: torch.Tensor) -> torch.Tensor:
            return super().forward(seen)

    guide = capture(Named().eval(), {"seen": models.vectors(2, 5, 4)})
    stateless, signature = converted(guide, {"inner": Target("elman", lookahead=2)})
    delayed = DelaySteps(signature)(stateless).graph_module
    assert [s.name for s in delayed.meta["stream"].inputs] == ["seen", "seen_0"]
    assert_a_late_stream(stateless, signature, {"seen": models.vectors(3, TIME, 4)}, 2)


def test_a_network_in_which_no_part_looks_ahead_is_left_alone():
    stateless, signature = converted(captured.bert(), Target("gru", causal=True))
    assert DelaySteps(signature)(stateless).reason == "no part looks ahead"


class Placed(Residual):
    """Positions that are added behind the part."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Embedding(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.place(torch.arange(x.shape[1]))


def test_positions_that_are_read_behind_a_part_that_looks_ahead_are_refused_by_name():
    guide = capture(Placed().eval(), models.vectors(2, 5, 4))
    stateless, signature = converted(guide, {"inner": Target("elman", lookahead=2)})
    with pytest.raises(PassRefused, match=r"delay steps: add_1 .*, behind .*, reads place \(aten.embedding"):
        DelaySteps(signature)(stateless)


class Told(nn.Module):
    """A module of a user's own that carries a state, and takes no mask."""

    stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(16, 16, batch_first=True)

    def forward(self, x_BTD: torch.Tensor, state_BD: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        y_BTD, last = self.cell(x_BTD, None if state_BD is None else state_BD[None])
        return y_BTD, last[0]


def test_a_module_that_can_not_be_told_which_steps_hold_nothing_is_refused_behind_and_taken_in_front():
    stateless, signature = converted(captured.bert(), Target("gru", lookahead=2))
    mine = Told()
    calls = [n for n in stateless.graph.nodes if n.op == "call_module"]
    for call in calls:
        call.kwargs = {}
    stateless.part_1 = mine
    stateless.recompile()
    with pytest.raises(PassRefused, match="carries a state behind a part that looks ahead"):
        DelaySteps(signature)(stateless)
    stateless, _ = converted(captured.bert(), Target("gru", lookahead=2))
    next(n for n in stateless.graph.nodes if n.op == "call_module").kwargs = {}
    stateless.part_0 = mine
    stateless.recompile()
    assert_a_late_stream(stateless, signature, {**bert_inputs(), "attention_mask": torch.ones(3, TIME).long()}, 2)


def example() -> Example:
    stateless, signature = converted(captured.bert(), Target("gru", lookahead=2))
    return Example(DelaySteps(signature), stateless, tuple(bert_inputs().values()), same_outputs=False)
