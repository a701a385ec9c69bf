"""Tables of `datasets`, which need not be installed: they are known by what they offer. The last tests have the real
ones. And what collators give.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import thesean
from tests.guides import ids, llama
from tests.models import spread
from thesean.distill.row_tables import ROWS, as_batches
from thesean.errors import DataError


class Rows:
    """A table as `datasets` has it, in its torch format or in Python's own."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns, self.column_names = columns, list(columns)

    def iter(self, batch_size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, len(next(iter(self.columns.values()))), batch_size):
            yield {name: values[start : start + batch_size] for name, values in self.columns.items()}


class Table(Rows):
    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[k] for k in range(len(self)))


def columns(rows: int) -> dict[str, Any]:
    texts = [f"text {k}" for k in range(rows)]
    mask_BT = torch.ones(rows, 12, dtype=torch.long)
    return {"input_ids": ids(rows, 12, 0), "attention_mask": mask_BT, "idx": torch.arange(rows), "text": texts}


def test_a_table_is_read_in_batches_and_its_last_ones_are_held_out():
    batches = as_batches(Table(columns(5 * ROWS)))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(ROWS, 12)] * 5
    assert torch.equal(batches[-1:][0]["idx"], torch.arange(4 * ROWS, 5 * ROWS))
    torch.manual_seed(0)
    converted = thesean.compile(
        spread(llama().eval()), "identity", data=Table(columns(5 * ROWS)), recipe="fast", progress=False
    )
    assert [s.name for s in converted.signature.inputs] == ["input_ids", "attention_mask"]
    notes = " ".join(converted.report.notes)
    assert "the last batch of data was held out" in notes
    assert "of each batch no input: idx, text" in notes


def test_rows_that_only_come_in_an_order_are_batches_too():
    batches = as_batches(Rows(columns(ROWS + 3)))
    assert [len(batch["idx"]) for batch in batches] == [ROWS, 3]
    assert [len(batch["idx"]) for batch in batches] == [ROWS, 3]  # and again


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (Table({"input_ids": [[1, 2], [3, 4]]}), r"'input_ids' holds lists.*set_format\('torch'\)"),
        (Table({"input_ids": [torch.ones(2), torch.ones(3)]}), r"rows of 'input_ids' are of shapes \(2,\), \(3,\)"),
        ({"input_ids": torch.ones(2, 3)}, r"data is one batch.*data=\[batch\]"),
        (Table({"input_ids": [[1, 2]]}), "'input_ids' holds lists"),
        (Table({"input_ids": [1.5]}), "'input_ids' holds lists"),
        (Table({"input_ids": [torch.ones(k) for k in (5, 3, 2, 3)]}), r"are of shapes \(2,\), \(3,\): pad them"),
        (Table({"input_ids": [torch.ones(2)]}), r"are of shapes \(2,\): pad them"),
        ({"train": Table(columns(3))}, "data is a dict of 'train';.*Pass one of its entries"),
        ({"train": Table(columns(3)), "test": Table(columns(3))}, "data is a dict of 'train', 'test';"),
        ({}, "data is a dict of nothing;"),
    ],
)
def test_what_is_no_iterable_of_batches_is_told_with_the_next_step(data, told):
    with pytest.raises(DataError, match=told):
        list(as_batches(data))


class Sized(Rows):
    """As many rows as it says, one after another."""

    def __len__(self) -> int:
        return ROWS + 3


def test_rows_that_can_be_counted_and_not_indexed_come_in_their_order():
    assert [len(batch["idx"]) for batch in as_batches(Sized(columns(ROWS + 3)))] == [ROWS, 3]


def test_any_other_iterable_is_left_as_it_is():
    data: Any
    named = type("Named", (), {"column_names": ["x"], "iter": None})()
    for data in ([torch.ones(2)], DataLoader([1, 2]), None, named):  # type: ignore[arg-type]
        assert as_batches(data) is data


@pytest.mark.parametrize("collator", ["language modeling", "padding", "encodings"])
def test_batches_of_transformers_collators_are_taken(collator):
    pytest.importorskip("transformers")
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

    from tests.hf.converted import tokenizer

    words = tokenizer(side="right")
    texts = [" ".join(f"w{(k + t) % 29}" for t in range(4 + k % 5)) for k in range(16)]
    rows = [dict(words(text)) for text in texts]
    data: Any = [words(texts[k : k + 4], padding=True, return_tensors="pt") for k in range(0, 16, 4)]
    if collator != "encodings":
        asks = collator == "language modeling"
        collate = DataCollatorForLanguageModeling(words, mlm=False) if asks else DataCollatorWithPadding(words)
        data = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    torch.manual_seed(0)
    converted = thesean.compile(
        spread(llama().eval()), "identity", data=data, recipe="fast", loss=thesean.next_token, progress=False
    )
    assert [s.name for s in converted.signature.inputs] == ["input_ids", "attention_mask"]
    assert converted.report.converted["loss"] < 10


def real(rows: int, shape: str) -> Any:
    """The same columns as the package has them: in memory, one row after another, as several tables."""
    import datasets

    table = datasets.Dataset.from_dict({k: v if k == "text" else v.tolist() for k, v in columns(rows).items()})
    table = table.with_format("torch")
    if shape == "stream":
        return table.to_iterable_dataset().with_format("torch")
    return datasets.DatasetDict(train=table) if shape == "splits" else table


@pytest.mark.parametrize("shape", ["table", "stream"])
def test_a_real_table_is_read_as_the_one_that_stands_in_for_it(shape):
    pytest.importorskip("datasets")
    wanted = list(as_batches(Table(columns(2 * ROWS + 3))))
    found = as_batches(real(2 * ROWS + 3, shape))
    for _ in range(2):
        for batch, other in zip(found, wanted, strict=True):
            assert torch.equal(batch["input_ids"], other["input_ids"])
            assert list(batch["text"]) == other["text"]
    torch.manual_seed(0)
    guide = spread(llama().eval())
    converted = thesean.compile(
        guide, "identity", data=real(2 * ROWS, shape), recipe="fast", loss=thesean.next_token, progress=False
    )
    assert [s.name for s in converted.signature.inputs] == ["input_ids", "attention_mask"]
    assert "of each batch no input: idx, text" in " ".join(converted.report.notes)


def test_a_real_table_of_lists_and_one_of_splits_say_what_to_do():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"'input_ids' holds lists.*set_format\('torch'\)"):
        list(as_batches(real(4, "table").with_format(None)))
    with pytest.raises(DataError, match=r"data is a DatasetDict of 'train';.*Pass one of its entries"):
        list(as_batches(real(4, "splits")))
