"""What no export can write is known before anything trains; what it can is not warned of.

B batch, T time, D width
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.exported import hybrid
from thesean.deploy import rehearse
from thesean.deploy.rehearse import unwritable
from thesean.passes.capture.capture import capture


@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert, captured.llama, captured.resnet, captured.tabled])
def test_what_exports_is_not_warned_of_and_costs_no_table(guide, monkeypatch):
    monkeypatch.setattr(rehearse, "is_registered", None)
    assert unwritable(guide().graph_module) == ""


def test_replaced_parts_are_what_they_are_in_the_file():
    assert unwritable(hybrid(captured.gpt2(), "mingru")) == ""


def test_an_operator_without_a_form_is_named_with_its_part():
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Identity())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cummax(self.inner(x), 1)[0]

    told = unwritable(capture(Running().eval(), models.vectors(3, 5, 6)).graph_module)
    assert told.startswith("no ONNX form is known of aten.cummax.default: an export will fail there")


@pytest.mark.parametrize(("form", "missing"), [("product", ""), ("einsum", "aten.einsum.default")])
def test_an_operator_with_a_form_for_real_numbers_alone_is_named_where_it_is_given_complex_ones(form, missing):
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_FD = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spectrum = torch.fft.rfft(x, dim=1)
            if form == "einsum":
                spectrum = torch.einsum("bfd,fd->bfd", spectrum, self.weight_FD)
            else:
                spectrum = spectrum * self.weight_FD
            return torch.fft.irfft(spectrum, n=6, dim=1)

    told = unwritable(capture(Spectral().eval(), models.vectors(3, 6, 6)).graph_module)
    assert missing in told
    assert bool(told) == bool(missing)
