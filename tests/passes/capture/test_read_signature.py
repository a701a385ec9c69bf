"""How many rows the tables have that an input indexes, however it is read."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests import models
from thesean.passes.capture.capture import capture

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
