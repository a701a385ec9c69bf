"""Positions stay inside the guide's tables.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.passes.contract import Example
from thesean.errors import PassRefused
from thesean.passes.analyse.positions import table_rows
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture
from thesean.passes.graph import graph_json
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.recipe import Positions

ROWS = 6


class Counted(nn.Module):
    """Returns the rows that it reads, so that a test can compare them with rows worked out by hand."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.words = nn.Embedding(models.VOCABULARY, 2)
        self.table = nn.Embedding(ROWS, 2)
        self.register_buffer("ids", torch.arange(ROWS)[None])
        self.register_buffer("buckets", torch.tensor([0, 1, 1, 2, 2, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        if self.form == "arange":
            at = self.table(torch.arange(T))
        elif self.form == "from two":
            at = self.table(torch.arange(T) + 2)
        elif self.form == "slice":
            at = self.table.weight[:T]
        elif self.form == "index":
            at = self.table.weight[torch.arange(T)]
        elif self.form == "columns":
            at = self.table.weight.T[:, torch.arange(T)].T
        elif self.form == "select":
            at = self.table.weight.T.index_select(1, torch.arange(T)).T
        elif self.form == "gather":
            at = self.table.weight.gather(0, torch.arange(T)[:, None].expand(T, 2))
        elif self.form == "buckets":  # whole numbers that don't count
            at = self.table(self.buckets[:T])
        elif self.form == "mask":  # counts what is visible
            visible = (x >= 0).long()
            at = self.table((visible.cumsum(1) * visible - 1).clamp(min=0))
        else:  # a slice of a buffer of positions, which then index the table
            at = self.table(self.ids[:, :T])
        return at + 0 * self.words(x)


def graph_of(form: str) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    guide = Counted(form).eval()
    return capture(guide, {"x": models.tokens(2, 3)}).graph_module, guide.table.weight.detach()


FORMS = ["arange", "slice", "index", "columns", "select", "gather", "mask", "buffer"]

ZEROS = ROWS  # a row of zeros, as the table's next one
EXPECTED: dict[tuple[str, str], list[int]] = {
    **{(form, "clamp"): [0, 1, 2, 3, 4, 5, 5, 5] for form in FORMS},
    **{(form, "wrap"): [0, 1, 2, 3, 4, 5, 0, 1] for form in FORMS},
    **{(form, "drop"): [0, 1, 2, 3, 4, 5, ZEROS, ZEROS] for form in FORMS},
    ("from two", "clamp"): [2, 3, 4, 5, 5, 5, 5, 5],
    ("from two", "wrap"): [2, 3, 4, 5, 2, 3, 4, 5],
    ("from two", "drop"): [2, 3, 4, 5, ZEROS, ZEROS, ZEROS, ZEROS],
}


def test_the_graph_before_and_after():
    before = [
        "embedding = aten.embedding.default(table_weight, arange)",
        "embedding_1 = aten.embedding.default(words_weight, x)",
        "mul = aten.mul.Tensor(embedding_1, 0)",
        "add = aten.add.Tensor(embedding, mul)",
        "return add",
    ]
    cases: list[tuple[Positions, str]] = [
        ("clamp", "clamp_default = aten.clamp.default(arange, None, 5)"),
        ("wrap", "remainder_scalar = aten.remainder.Scalar(arange, 6)"),
    ]
    for mode, bounded in cases:
        module, _ = graph_of("arange")
        lines = text(module.graph)
        count = lines.index(before[0])
        assert lines[count:] == before
        BoundPositions(mode)(module)
        name = bounded.split(" = ")[0]
        expected = [*lines[:count], bounded, before[0].replace("arange", name), *before[1:]]
        assert text(module.graph) == expected


@pytest.mark.thorough
@pytest.mark.parametrize(("form", "mode"), EXPECTED)
def test_steps_past_the_table_read_the_rows_that_the_mode_says(form, mode):
    module, table = graph_of(form)
    assert BoundPositions(mode)(module).modified
    found = module(x=models.tokens(2, 8))
    rows = torch.cat([table, torch.zeros(1, 2)])
    torch.testing.assert_close(found[0], rows[EXPECTED[form, mode]], rtol=0, atol=0)


@pytest.mark.parametrize(("form", "rows"), [*((form, 6) for form in FORMS), ("from two", 4)])
def test_the_table_tells_how_long_a_sequence_may_be(form, rows):
    module, _ = graph_of(form)
    assert table_rows(module) == rows
    module(x=models.tokens(2, rows))
    with pytest.raises((IndexError, RuntimeError)):
        module(x=models.tokens(2, rows + 1))
    BoundPositions("clamp")(module)
    assert table_rows(module) is None


class Summed(nn.Module):
    """A token of the network's own stands before the others, and takes the first row of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.words = nn.Parameter(torch.randn(1, 1, 2)), nn.Embedding(models.VOCABULARY, 2)
        self.table = nn.Parameter(torch.randn(ROWS, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.own.expand(x.shape[0], -1, -1), self.words(x)], 1)
        return tokens + self.table[: x.shape[1] + 1]


def test_a_slice_of_one_row_more_than_tokens_is_bounded_a_token_earlier():
    guide = models.seeded(Summed)
    module = capture(guide, {"x": models.tokens(2, 3)}).graph_module
    assert table_rows(module) == ROWS - 1
    fits, long = models.tokens(2, ROWS - 1), models.tokens(2, ROWS + 1)
    whole = module(x=fits)
    BoundPositions("clamp")(module)
    assert torch.equal(module(x=fits), whole)
    rows = guide.table.detach()[[*range(ROWS), ROWS - 1, ROWS - 1]]
    torch.testing.assert_close(module(x=long)[0, 1:], (guide.words(long[0]) + rows[1:]).detach())


@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert])
@pytest.mark.parametrize("mode", ["clamp", "wrap", "drop"])
def test_lengths_inside_the_table_give_the_same_numbers_bit_for_bit(guide, mode):
    module = clone(guide().graph_module)
    sizes = {symbol: 3 if symbol.startswith("batch") else 64 for symbol in guide().signature.symbols}
    inputs = guide().signature.random_inputs(sizes)
    before: Any = module(**inputs)
    assert table_rows(module) == 64
    assert BoundPositions(mode)(module).modified
    after: Any = module(**inputs)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_hybrid_runs_past_the_guides_table_with_and_without_metadata():
    module = build_hybrid(make_plan(captured.gpt2(), "mingru")).graph_module
    bare = fx.GraphModule(module, graph_json.load(graph_json.dump(module.graph)))
    for one in (module, bare):
        assert BoundPositions()(one).modified
        assert one(input_ids=models.tokens(2, 100))["logits"].shape == (2, 100, models.VOCABULARY)


def test_refusing_changes_nothing_and_says_how_far_the_table_goes():
    module, _ = graph_of("arange")
    result = BoundPositions("refuse")(module)
    assert not result.modified
    assert result.graph_module is module
    assert result.reason == "lengths past 6 positions are refused"


@pytest.mark.parametrize("guide", [captured.llama, captured.token_mixer])
def test_a_network_without_a_table_is_left_alone_with_a_reason(guide):
    module = guide().graph_module
    result = BoundPositions()(module)
    assert not result.modified
    assert result.reason == "no table is indexed by a growing position"
    assert table_rows(module) is None


def test_indices_from_the_callers_data_are_not_bounded():
    module, _ = graph_of("arange")
    BoundPositions("clamp")(module)
    with pytest.raises(IndexError):
        module(x=torch.full((2, 3), models.VOCABULARY))


def test_nothing_is_dropped_from_a_table_in_which_no_row_adds_nothing():
    module, _ = graph_of("buckets")
    before = str(module.graph)
    with pytest.raises(PassRefused, match=r"reads a table of torch.int64, which has no .* Use positions 'clamp'"):
        BoundPositions("drop")(module)
    assert str(module.graph) == before
    assert BoundPositions("clamp")(module).modified


def test_an_unknown_mode_is_refused():
    module, _ = graph_of("arange")
    with pytest.raises(PassRefused, match="expected one of clamp, wrap, drop, refuse, found 'drp'"):
        BoundPositions("drp")(module)  # type: ignore[arg-type]


def example() -> Example:
    captured = capture(Counted("arange").eval(), models.tokens(2, 4))
    return Example(BoundPositions("wrap"), captured.graph_module, (models.tokens(2, 5),))
