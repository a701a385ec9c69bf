"""B batch, T time, D width"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tests.models import seeded, vectors
from thesean.passes.capture.capture import capture


class Started(nn.Module):
    """x_BTD -> y_BTD, read behind a token of its own; what it asks the length of is a tensor, a list or a module."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.maps = nn.Parameter(torch.ones(1, 1, 6)), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        for k in range(len(self.maps)):
            x = self.maps[k](x) / len([x, x])
        return x[:, 1:]


def test_a_batch_that_is_asked_for_its_length_stays_free():
    guide = seeded(Started)
    found = capture(guide, vectors(4, 5, 6))
    assert found.signature.symbols == ("batch", "time")
    for rows, steps in ((1, 7), (9, 2)):
        x = vectors(rows, steps, 6, seed=rows)
        torch.testing.assert_close(found.graph_module(x), guide(x))
    assert "len" not in vars(sys.modules[__name__])


def test_a_file_with_a_len_of_its_own_keeps_it(monkeypatch):
    asked: list[torch.Tensor] = []

    def own(x: object) -> int:
        if isinstance(x, torch.Tensor):
            asked.append(x)
            return x.shape[0]
        return 2

    monkeypatch.setitem(vars(sys.modules[__name__]), "len", own)
    capture(seeded(Started), vectors(4, 5, 6))
    assert asked
    assert vars(sys.modules[__name__])["len"] is own


@pytest.mark.parametrize("shape", [(), (3,)])
def test_outside_of_a_trace_it_is_pythons(shape: tuple[int, ...]):
    if shape:
        assert type(len(torch.ones(shape))) is int
    else:
        with pytest.raises(TypeError, match="0-d"):
            len(torch.ones(shape))
