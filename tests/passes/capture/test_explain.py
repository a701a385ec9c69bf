"""B batch, T time, D width"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models import vectors
from thesean.errors import CaptureError
from thesean.passes.capture.capture import capture


class Doing(nn.Module):
    def __init__(self, what: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.what, self.map = what, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.what(self.map(x))


def into_another(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x, out=torch.empty_like(x))


def by_numpy(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().numpy() + 1)


def looking(x: torch.Tensor) -> torch.Tensor:
    assert not x.isnan().any()
    return x


def by_a_number(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.abs().max())


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (into_another, "take what the function returns, without out="),
        (by_numpy, "write that line with torch's own operators"),
        (looking, "leave it out, or make it one of shapes"),
        (by_a_number, r"leave out float\(\), \.item\(\)"),
    ],
)
def test_an_error_says_what_to_do_with_its_line(what, told, capfd):
    with pytest.raises(CaptureError, match=rf"test_explain\.py, line \d+, in {what.__name__}: .*{told}") as error:
        capture(Doing(what).eval(), vectors(3, 5, 4))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # torch prints the graph as far as it came
