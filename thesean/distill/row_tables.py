"""Tables of rows, as the package `datasets` has them, read in batches. They are known by what they offer: names of
columns, and `iter` over several rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch

from thesean.errors import DataError

ROWS = 8  # of a batch


def as_batches(data: Any, name: str = "data") -> Any:
    """`data` itself, unless it is a table. Raises DataError for one batch, or several tables by name, in place of an
    iterable of batches.
    """
    if isinstance(data, Mapping):
        if any(isinstance(value, torch.Tensor) for value in data.values()):
            raise DataError(f"{name} is one batch; expected an iterable of batches. Wrap it: {name}=[batch].")
        keys = ", ".join(map(repr, data)) or "nothing"
        raise DataError(
            f"{name} is a {type(data).__name__} of {keys}; expected an iterable of batches. Pass one of its entries."
        )
    if not hasattr(data, "column_names") or not callable(getattr(data, "iter", None)):
        return data
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return RowTable(data, name, range(0, len(data), ROWS))
    return RowStream(data, name)


@dataclass(frozen=True)
class RowTable(Sequence[dict[str, Any]]):
    """Batches of rows that can be indexed, by where each begins."""

    table: Any
    name: str
    starts: range

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | RowTable:
        if isinstance(index, slice):
            return RowTable(self.table, self.name, self.starts[index])
        start = self.starts[index]
        return _batch(self.table[start : start + ROWS], self.name)


@dataclass(frozen=True)
class RowStream(Iterable[dict[str, Any]]):
    """Batches of rows that come in an order."""

    table: Any
    name: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for columns in self.table.iter(batch_size=ROWS):
            yield _batch(columns, self.name)


def _batch(columns: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A batch's columns. Raises DataError for numbers that are no tensors, and for rows that don't stack."""
    for column, values in columns.items():
        if isinstance(values, torch.Tensor) or not isinstance(values, (list, tuple)) or not values:
            continue
        if isinstance(values[0], torch.Tensor):
            shapes = sorted({tuple(row.shape) for row in values})[:2]
            raise DataError(
                f"{name}: rows of {column!r} are of shapes {', '.join(map(str, shapes))}: pad them, as a DataLoader "
                "does with collate_fn=DataCollatorWithPadding(tokenizer)."
            )
        if isinstance(values[0], (int, float, list)):
            raise DataError(f"{name}: {column!r} holds lists; expected tensors. Call {name}.set_format('torch').")
    return dict(columns)
