"""A network is a stream where each of its steps is its own, or is refused by the node that mixes them.

B batch, T time, D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.exported import hybrid
from tests.models import VOCABULARY, seeded
from thesean.deploy.describe_file import describe_file
from thesean.deploy.export import export
from thesean.deploy.export_passes import streaming
from thesean.errors import ExportError, PassRefused
from thesean.passes.analyse.chunks import join, run_in_chunks
from thesean.passes.analyse.threaded import Threaded, _pieces
from thesean.passes.base import run_passes
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.thread_state import FAR, UNTRIED, zero_states

Rule = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]

_RARE = 7  # a token that stands once in each text
_LONG = 150


class Text(nn.Module):
    """ids_BT -> logits_BTV: a causal block on a rule's x_BTD, made of the ids and their rows of the table.

    The block is a cell: it is replaced, and what it was makes no odds. With `attends` comes an attention that stays.
    """

    def __init__(self, rule: Rule, attends: bool = False) -> None:
        super().__init__()
        self.rule = rule
        self.table, self.places, self.head = nn.Embedding(VOCABULARY, 8), nn.Embedding(400, 8), nn.Linear(8, VOCABULARY)
        self.block = nn.GRU(8, 8, batch_first=True)
        self.kept = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) if attends else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.rule(self, ids, self.table(ids))
        x = x + self.block(x)[0]
        if self.kept is not None:
            x = self.kept(x, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1))
        return self.head(x)


def texts(rows: int = 3, time: int = 40) -> torch.Tensor:
    """ids_BT"""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(_RARE + 1, VOCABULARY, (rows, time), generator=generator)
    ids_BT[torch.arange(rows), torch.randint(time // 2, time, (rows,), generator=generator)] = _RARE
    return ids_BT


def at(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1])


STREAMS: dict[str, Rule] = {
    "nothing": lambda m, ids, x: x,
    "a count of the data": lambda m, ids, x: x + m.places((ids == _RARE).cumsum(1)),
    "a bounded count of the data": lambda m, ids, x: x + m.places((ids == _RARE).cumsum(1).clamp(max=2)),
    "positions": lambda m, ids, x: x + m.places(at(ids)),
    "positions of a row in front": lambda m, ids, x: x + m.places(at(ids))[None],
    "positions in turns": lambda m, ids, x: x + m.places(at(ids) % 7)[None],
    "positions by sixteen": lambda m, ids, x: x + m.places(at(ids) // 16)[None],
    "every second position": lambda m, ids, x: x + m.places(torch.arange(0, 2 * ids.shape[1], 2))[None],
    "after 50 steps": lambda m, ids, x: torch.where(at(ids)[None, :, None] < 50, x * 2, x),
    "a drift that ends": lambda m, ids, x: x * at(ids)[:, None].clamp(max=60) / 60,
    "all of it": lambda m, ids, x: x[:, : ids.shape[1]] + x[:, 0:],
    "a maximum so far": lambda m, ids, x: x.cummax(1).values,
    "a sum so far": lambda m, ids, x: x + x.cumsum(1),
    "the step before": lambda m, ids, x: x + F.pad(x[:, :-1], (0, 0, 1, 0)),
    "a norm of each step": lambda m, ids, x: F.normalize(x, dim=-1) + x.softmax(2) + x.sort(-1).values + x.flip(2),
    "heads": lambda m, ids, x: (x.unflatten(2, (2, 4)).transpose(1, 2) * 2).transpose(1, 2).flatten(2),
    "a pad of the width": lambda m, ids, x: F.pad(x, (1, 1))[..., 1:-1] @ m.head.weight.T @ m.head.weight,
}

MIXED: dict[str, tuple[Rule, str]] = {
    "a cut": (lambda m, ids, x: torch.cat([x[:, :32] * 0.5, x[:, 32:]], 1), "cuts the sequence"),
    "a cut past all probes": (lambda m, ids, x: torch.cat([x[:, :130] * 0.5, x[:, 130:]], 1), "cuts the sequence"),
    "a cut from the end": (lambda m, ids, x: torch.cat([x[:, :-30] * 0.5, x[:, -30:]], 1), "cuts the sequence"),
    "every second step": (lambda m, ids, x: x + x[:, ::2].mean(1, keepdim=True), "slice"),
    "whether any is rare": (lambda m, ids, x: x * (ids == _RARE).any(1)[:, None, None], "works along time"),
    "whether any of all is rare": (lambda m, ids, x: x * (ids == 99).any(), "sums up the steps"),
    "where the first rare one is": (
        lambda m, ids, x: x + m.places((ids == _RARE).int().argmax(1))[:, None],
        "works along time",
    ),
    "a maximum": (lambda m, ids, x: x - x.amax(1, keepdim=True), "amax"),
    "a product so far": (lambda m, ids, x: x * (ids != _RARE).long().cumprod(1)[..., None], "works along time"),
    "the mean": (lambda m, ids, x: x - x.mean(1, keepdim=True), "mean"),
    "sorted steps": (lambda m, ids, x: x.sort(1).values, "mixes time"),
    "sorted tokens that are nearly so": (
        lambda m, ids, x: x + m.table((ids == 99).long().sort(1).values),
        "mixes time",
    ),
    "flipped": (lambda m, ids, x: x + x.flip(1), "flip"),
    "rolled": (lambda m, ids, x: x + x.roll(1, 1), "roll"),
    "a softmax over time": (lambda m, ids, x: x * x.softmax(1), "softmax"),
    "a norm over time": (lambda m, ids, x: F.normalize(x, dim=1), "linalg_vector_norm"),
    "the last step": (lambda m, ids, x: x + x[:, -1:], "add"),
    "the last token, if it is rare": (lambda m, ids, x: x * (ids[:, -1] != 99)[:, None, None], "last step meets"),
    "the first step": (lambda m, ids, x: x + x[:, :1], "slice"),
    "the step after": (lambda m, ids, x: x + F.pad(x[:, 1:], (0, 0, 0, 1)), "not the chunks' in a row"),
    "the length": (lambda m, ids, x: x * ids.shape[1], "mul"),
    "how far the end is": (lambda m, ids, x: x + m.places(ids.shape[1] - 1 - at(ids)), "mixes time"),
    "similarities": (lambda m, ids, x: (x @ x.mT) @ x, "matmul"),
    "picked steps": (lambda m, ids, x: x + x.index_select(1, at(ids) // 2), "mixes time"),
    "filled steps": (lambda m, ids, x: x.index_fill(1, torch.tensor([0]), 0.0), "index_fill"),
}  # fmt: skip


# while one works, a count, a bound and a table; and steps, a sum, a product and a cut
FEW = (
    "a bounded count of the data", "positions in turns", "after 50 steps",
    "the step before", "a sum so far", "the step after", "a product so far", "a cut past all probes",
)  # fmt: skip


def soon(rules: Iterable[str]) -> list[Any]:
    return [rule if rule in FEW else pytest.param(rule, marks=pytest.mark.thorough) for rule in rules]


@cache
def text_by(rule: Rule) -> Captured:
    return capture(seeded(Text, rule), texts())


def threaded(rule: Rule) -> Any:
    guide = text_by(rule)
    stateless = hybrid(guide, {"block": "gru"})
    return run_passes(stateless, *streaming(guide.signature, ahead=True))[0], stateless, guide.signature


@pytest.mark.parametrize("rule", soon(STREAMS))
@torch.no_grad()
def test_a_network_whose_steps_are_their_own_is_a_stream_at_any_length(rule):
    graph_module, stateless, signature = threaded(STREAMS[rule])
    inputs = {"ids": texts(2, _LONG)}
    chunks = (1,) * 70 + (_LONG - 71, 1)
    pieces, _ = run_in_chunks(graph_module, signature, inputs, zero_states(graph_module, 2), chunks)
    whole = stateless(**inputs)
    found = join([outputs[0] for outputs in pieces], whole.shape)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", soon(MIXED))
def test_a_network_that_mixes_steps_is_refused_by_the_node_that_does(rule):
    made, why = MIXED[rule]
    with pytest.raises(PassRefused, match=why):
        threaded(made)


@pytest.mark.parametrize(("rule", "far"), [("after 50 steps", 53), ("a drift that ends", 63), ("nothing", 9)])
def test_a_stream_is_compared_past_what_its_positions_are_compared_with(rule, far):
    assert threaded(STREAMS[rule])[0].meta[FAR] == far


@pytest.mark.parametrize("length", [1, 2])
def test_a_stream_is_compared_from_any_length_on(length):
    graph_module, stateless, signature = threaded(STREAMS["after 50 steps"])
    states = zero_states(graph_module, 1)
    compared = Threaded(graph_module=graph_module, stateless=stateless, signature=signature, states=states)
    assert compared.compare(length).length == 53


@cache
def after(steps: int) -> Rule:
    return lambda m, ids, x: torch.where(at(ids)[None, :, None] < steps, x * 2, x)


@pytest.mark.parametrize(("steps", "far"), [(5000, 5003), (32768, 32771), (32769, 9)])
def test_past_four_thousand_steps_a_stream_is_compared_where_a_step_costs_what_the_last_one_did(steps, far):
    graph_module, _, _ = threaded(after(steps))
    assert graph_module.meta[FAR] == far
    assert graph_module.meta[UNTRIED] == ((steps,) if far == 9 else ())


def test_what_goes_another_way_past_four_thousand_steps_is_found():
    graph_module, _, signature = threaded(after(5000))
    _, stateless, _ = threaded(STREAMS["nothing"])
    states = zero_states(graph_module, 1)
    right = hybrid(text_by(lambda m, ids, x: x * 2), {"block": "gru"})
    right.load_state_dict(stateless.state_dict())
    both = Threaded(graph_module=graph_module, stateless=right, signature=signature, states=states)
    assert both.compare(9).misfit == "output 0 of chunks of 5003 steps isn't the whole sequence's."


def test_a_smaller_constant_is_tried_where_the_largest_is_past_the_end_of_a_table():
    """The table has 400 rows: a sequence of 3,000 doesn't run."""

    def rule(m: Any, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return after(3000)(m, ids, after(50)(m, ids, x)) + m.places(at(ids))

    assert threaded(rule)[0].meta[FAR] == 53


@pytest.mark.parametrize(
    ("limit", "value"),
    [("_FARTHEST_LINEAR", 5002), ("_LARGEST_BYTES", 5003 * 32 * 4 - 1), ("_MOST_PRODUCTS", 5003 * 1000)],
)
def test_a_sequence_that_takes_long_is_not_tried(limit, value, monkeypatch):
    monkeypatch.setattr(f"thesean.passes.analyse.threaded.{limit}", value)
    assert threaded(after(5000))[0].meta[UNTRIED] == (5000,)


def test_what_a_stream_was_not_tried_past_is_told_by_report_and_file(tmp_path):
    guide = capture(seeded(Text, after(5000), True), texts())  # each step of an attention takes longer than the last
    report = export(hybrid(guide, {"block": "gru"}), guide.signature, tmp_path / "m.onnx")
    assert report.stateful
    told = "with state not tried past step 5000, with which positions are compared"
    assert told in report.note
    shown, metadata = describe_file(report.path)
    assert told in shown
    assert metadata["thesean.untried"] == "[5000]"


def test_a_file_whose_numbers_with_state_are_wrong_is_written_without(tmp_path, monkeypatch):
    """A network that all checks before an export let pass: what onnxruntime gives in chunks has the last word."""
    from thesean.passes.analyse import threaded as checks

    monkeypatch.setattr(checks.Threaded, "compare", lambda self, length: checks.Compared(length=length))
    guide = text_by(MIXED["the mean"][0])
    module = hybrid(guide, {"block": "gru"})
    report = export(module, guide.signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert report.note.startswith("without state: ")
    assert "chunks in" in report.note
    assert report.inputs == ("ids",)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(ExportError, match="chunks in"):
        export(module, guide.signature, tmp_path / "yes.onnx", stateful="yes")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_checks_read_the_callers_own_sequences_in_order():
    guide = text_by(STREAMS["nothing"])
    made = guide.signature.random_inputs({"batch": 2, "time": 100}, in_order=True)["ids"]
    assert torch.equal(made[0], texts(3, 40).flatten()[:100])
    assert torch.equal(made[1], texts(3, 40).flatten().roll(-40)[:100])


def test_pieces_are_steps_where_another_way_may_begin_and_none_is_empty():
    assert _pieces([], 9) == [9]
    assert _pieces([4], 9) == [3, 1, 1, 1, 3]
    assert _pieces([4], 6) == [3, 1, 1, 1]  # a cut at the end is none
    assert _pieces([0, 40], 3) == [1, 1, 1]
