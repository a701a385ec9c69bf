"""B batch, T time"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models import vectors
from thesean.passes.capture.capture import capture
from thesean.passes.capture.unread import without_unread


class Open(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        return self.last(x + more["shift"] if "shift" in more else x)


def names(example: dict[str, torch.Tensor]) -> list[str]:
    model = Open()
    found = without_unread(capture(model, example), model)
    assert torch.equal(found.graph_module(**found.example), model(**found.example))
    assert list(found.example) == [s.name for s in found.signature.inputs]
    return list(found.example)


def test_what_forward_neither_names_nor_reads_goes():
    x_BD, row_B = vectors(4, 3), torch.arange(4)
    assert names({"x": x_BD, "idx": row_B}) == ["x"]
    assert names({"x": x_BD, "mask": row_B, "idx": row_B}) == ["x", "mask"]  # named: a caller may give it
    assert names({"x": x_BD, "shift": vectors(4, 3, seed=1), "idx": row_B}) == ["x", "shift"]
