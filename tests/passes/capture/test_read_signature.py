"""How many rows the tables have that an input indexes, however it is read; and what else a signature says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import models
from tests.written import written
from thesean.passes.capture.capture import capture
from thesean.passes.capture.read_signature import read_signature

aten = torch.ops.aten

READ: dict[str, int | None] = {
    "embedded": 11, "one_hot": 7, "indexed": 9, "behind": 9, "before": 12, "columns": 6, "second": 6, "gathered": 9,
    "twice": 7, "viewed": 11, "counted": None, "summed": None,
}  # fmt: skip


class Reads(nn.Module):
    """Each input, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.few = nn.Embedding(11, 4), nn.Embedding(7, 4)
        self.table = nn.Parameter(torch.randn(9, 6))

    def forward(self, **ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "embedded": self.words(ids["embedded"]),
            "one_hot": F.one_hot(ids["one_hot"], 7).float(),
            "indexed": self.table[ids["indexed"]],
            "behind": self.words(ids["behind"] + 2),
            "before": self.words(ids["before"] - 1),
            "columns": self.table.index_select(1, ids["columns"].view(-1)).sum(),
            "second": self.table[:, ids["second"]].sum(0),
            "gathered": self.table[:, 0].gather(0, ids["gathered"].view(-1)).sum(),
            "twice": self.words(ids["twice"]) + self.few(ids["twice"]),
            "viewed": self.words(ids["viewed"].unsqueeze(1)[:, 0].to(torch.int64)),
            "counted": self.words(ids["counted"].cumsum(1).clamp(max=3)),
            "summed": ids["summed"].float(),
        }


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reads = Reads()

    def forward(
        self,
        embedded: torch.Tensor, one_hot: torch.Tensor, indexed: torch.Tensor, behind: torch.Tensor,
        before: torch.Tensor, columns: torch.Tensor, second: torch.Tensor, gathered: torch.Tensor,
        twice: torch.Tensor, viewed: torch.Tensor, counted: torch.Tensor, summed: torch.Tensor,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        given = {name: value for name, value in locals().items() if name in READ}
        return self.reads(**given)


def test_the_smallest_table_that_an_input_indexes_bounds_it():
    inputs = {name: torch.ones(3, 5, dtype=torch.int64) for name in READ}
    signature = capture(models.seeded(ByName), inputs).signature
    assert {spec.name: spec.high for spec in signature.inputs} == READ


class Apart(nn.Module):
    """Two texts that never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(models.VOCABULARY, 4)

    def forward(self, text: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"text": self.words(text), "other": self.words(other).cumsum(1)}


def test_lengths_that_are_as_long_in_the_example_alone_are_two_and_batches_are_one():
    example = {"text": models.tokens(3, 5), "other": models.tokens(3, 5)}
    captured = capture(models.seeded(Apart), example)
    assert [spec.shape for spec in captured.signature.inputs] == [("batch", "time"), ("batch", "time_1")]


Made = Callable[..., Any]

IDS = torch.ones(3, 5, dtype=torch.int64)


def embedded(c: Any, t: Any, ids: Any) -> Any:
    return c(aten.embedding.default, t, ids)


# of ids_BT and a table (9, 6): one more than the largest index that may be given; None where none is
INDEXED: dict[str, tuple[Made, int | None]] = {
    "itself": (lambda c, i, t: embedded(c, t, i), 9),
    "a view": (lambda c, i, t: embedded(c, t, c(aten.view.default, i, [15])), 9),
    "a copy": (lambda c, i, t: embedded(c, t, c(aten.clone.default, c(aten.transpose.int, i, 0, 1))), 9),
    "a part": (lambda c, i, t: embedded(c, t, c(aten.slice.Tensor, c(aten.select.int, i, 0, 1), 0, 1, 3)), 9),
    "a cast": (lambda c, i, t: embedded(c, t, c(aten.to.dtype, i, torch.int32)), 9),
    "several in a row": (lambda c, i, t: embedded(c, t, c(aten.cat.default, [i, i])), 9),
    "others for some": (lambda c, i, t: embedded(c, t, c(aten.masked_fill.Scalar, i, c(aten.ne.Scalar, i, 1), 0)), 9),
    "two more": (lambda c, i, t: embedded(c, t, c(aten.add.Tensor, i, 2)), 7),
    "one less": (lambda c, i, t: embedded(c, t, c(aten.sub.Tensor, i, 1)), 10),
    "two more and one less": (lambda c, i, t: embedded(c, t, c(aten.sub.Tensor, c(aten.add.Tensor, i, 2), 1)), 8),
    "two more of a view": (
        lambda c, i, t: embedded(c, t, c(aten.add.Tensor, c(aten.view.default, i, [15]), 2)), 7
    ),
    "twice as much": (lambda c, i, t: embedded(c, t, c(aten.mul.Tensor, i, 2)), None),
    "with itself": (lambda c, i, t: embedded(c, t, c(aten.add.Tensor, i, i)), None),
    "counted": (lambda c, i, t: embedded(c, t, c(aten.cumsum.default, i, 1)), None),
    "rows": (lambda c, i, t: c(aten.index.Tensor, t, [i]), 9),
    "columns": (lambda c, i, t: c(aten.index.Tensor, t, [None, i]), 6),
    "rows by name": (lambda c, i, t: c(aten.index.Tensor, t, indices=[i]), 9),
    "selected rows": (lambda c, i, t: c(aten.index_select.default, t, 0, c(aten.view.default, i, [15])), 9),
    "selected columns": (lambda c, i, t: c(aten.index_select.default, t, 1, c(aten.view.default, i, [15])), 6),
    "gathered": (lambda c, i, t: c(aten.gather.default, t, 1, i), 6),
    "bags": (
        lambda c, i, t: c(
            aten.embedding_bag.padding_idx, t, c(aten.view.default, i, [15]), c(aten.arange.default, 1), False, 0,
            False, None, False, None,
        ),
        9,
    ),
    "one of so many": (lambda c, i, t: c(aten.one_hot.default, i, 7), 7),
    "one of so many, by name": (lambda c, i, t: c(aten.one_hot.default, i, num_classes=7), 7),
    "one of as many as there are": (lambda c, i, t: c(aten.one_hot.default, i), None),
    "the smallest of several": (
        lambda c, i, t: (embedded(c, t, i), c(aten.one_hot.default, i, 4), c(aten.index.Tensor, t, [None, i])), 4
    ),
    "a table itself": (lambda c, i, t: c(aten.index_select.default, i, 1, c(aten.arange.default, 2)), None),
    "numbers": (lambda c, i, t: c(aten.to.dtype, i, torch.float32), None),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_is_bounded_by_its_table_wherever_it_stands(name):
    made, high = INDEXED[name]
    graph_module = written(made, IDS, t=nn.Parameter(torch.randn(9, 6)))
    (spec,) = read_signature(graph_module, {"x_0": IDS}, IDS, {}).inputs
    assert (spec.name, spec.dtype, spec.shape, spec.high, spec.mask) == ("x_0", torch.int64, (3, 5), high, False)
    assert spec.example is not None
    assert torch.equal(spec.example, IDS)
    assert graph_module.meta["symbols"] == {}


def test_floats_index_nothing_and_are_masks_where_they_are_met_as_such():
    x, mask = torch.randn(3, 5, 4), torch.ones(3, 5)
    graph_module = written(lambda c, x, m: c(aten.mul.Tensor, x, c(aten.unsqueeze.default, m, 2)), x, mask)
    specs = read_signature(graph_module, {"x_0": x, "x_1": mask}, x, {}).inputs
    assert [(spec.high, spec.mask) for spec in specs] == [(None, False), (None, True)]


@dataclass
class Record:
    logits: torch.Tensor


class Named(NamedTuple):
    logits: torch.Tensor


class Ordered(OrderedDict[str, torch.Tensor]):
    pass


@pytest.mark.parametrize(
    ("eager", "path", "record"),
    [
        (IDS, None, None),
        ({"a": IDS}, None, None),
        ([IDS], None, None),
        ((IDS,), None, None),
        (Record(IDS), f"{__name__}.Record", Record),
        (Named(IDS), f"{__name__}.Named", None),
        (Ordered(a=IDS), f"{__name__}.Ordered", Ordered),
    ],
)
def test_the_class_of_an_output_is_kept_where_it_is_one_of_its_own(eager, path, record):
    graph_module = written(lambda c, i: c(aten.neg.default, i), IDS)
    signature = read_signature(graph_module, {"x_0": IDS}, eager, {})
    assert (signature.output_class, signature.record) == (path, record)


class Rows(nn.Module):
    """Words of texts in a row, and as many offsets as texts; another text, and a mask of the first one's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(models.VOCABULARY, 4)

    def forward(self, words: torch.Tensor, starts: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        bags = F.embedding_bag(words, self.words.weight, starts)
        return {"bags": bags, "text": self.words(text).cumsum(1)}


def test_batches_of_other_sizes_are_others_and_of_the_same_size_one():
    example = {"words": models.tokens(1, 12)[0], "starts": torch.tensor([0, 4, 8]), "text": models.tokens(3, 5)}
    found = capture(models.seeded(Rows), example)
    assert [spec.shape for spec in found.signature.inputs] == [("batch",), ("batch_1",), ("batch_1", "time")]
    assert set(found.graph_module.meta["symbols"].values()) == {"batch", "batch_1", "time"}


class Table(nn.Module):
    """categories_BF, numbers_BN -> (B, 2), each column by a table of its own."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 4) for n in rows)
        self.read = nn.Linear(4 * len(rows) + 3, 2)

    def forward(self, categories: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        found = [table(categories[:, k]) for k, table in enumerate(self.tables)]
        return self.read(torch.cat([*found, numbers], 1))


@pytest.mark.parametrize(("rows", "high"), [((5, 7, 11), None), ((7, 7), 7)])
def test_columns_are_features_whose_tables_bound_each_alone(rows, high):
    categories = torch.stack([torch.arange(8) % n for n in rows], 1)
    found = capture(models.seeded(Table, *rows), (categories, models.vectors(8, 3)))
    spec = found.signature.inputs[0]
    assert spec.shape == ("batch", len(rows))
    assert spec.high == high
    assert found.notes == ()
    largest = torch.tensor([[n - 1 for n in rows]])
    assert found.signature.out_of_range({"categories": largest}) == ""


def test_steps_of_which_the_first_and_the_last_are_read_are_no_columns():
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.words(ids[:, 0]) + self.words(ids[:, -1])

    assert capture(models.seeded(Ends), models.tokens(2, 7) % 9).signature.inputs[0].shape == ("batch", "time")
