"""Guides that compute with complex numbers, in files of both precisions.

B batch, T time, D width, F frequencies
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import models
from thesean.deploy.export import export
from thesean.passes.capture.capture import capture


class LongConvolution(nn.Module):
    """x_BTD + (kernel * x)_BTD over all earlier steps, by way of its spectrum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.taps_D6 = nn.Parameter(torch.randn(width, 6))
        self.wide = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = 2 * x.shape[1]
        spectrum = torch.fft.rfft(self.wide(x).mT, n=size) * torch.fft.rfft(self.taps_D6, n=size)
        return x + torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]].mT


class Spectral(nn.Module):
    """x_BTD filtered along T at lengths that may be odd, and along D at a fixed one, all dimensions before the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.randn(width, dtype=torch.complex64))
        self.weight_F = nn.Parameter(torch.randn(width // 2 + 1, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.weight_D, n=x.shape[1], dim=1)
        return x + torch.fft.irfft(torch.fft.rfft(x, norm="ortho") * self.weight_F, n=x.shape[2], norm="ortho")


class Turned(nn.Module):
    """Neighbouring features turned by their step, as complex numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle_T1 = torch.arange(x.shape[1])[:, None] * 0.3
        pairs = torch.view_as_complex(self.wide(x).float().unflatten(-1, (-1, 2)))
        turned = pairs * torch.polar(torch.ones_like(angle_T1), angle_T1)
        return x + torch.view_as_real(turned).flatten(-2).type_as(x)


class TurnedByHead(nn.Module):
    """The same for two heads: what turns them is cut from a table, reshaped and given a dimension of one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 2 * width)
        angles = torch.arange(64)[:, None] * torch.logspace(0, -1, width // 2)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time, pairs = x.shape[1], torch.view_as_complex(self.wide(x).unflatten(-1, (2, -1, 2)))
        turned = pairs * self.turns[:time].view(1, time, -1).unsqueeze(2)
        return torch.view_as_real(turned.reshape(x.shape[0], time, -1)).flatten(2)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("kind", [LongConvolution, Spectral, Turned, TurnedByHead])
def test_a_file_gives_the_networks_numbers(kind, dtype, tmp_path):
    guide = capture(models.seeded(kind, 6), models.vectors(2, 8, 6))
    report = export(guide.graph_module, guide.signature, tmp_path / "complex.onnx", dtype=dtype)
    sizes = {check.shape for check in report.checks}
    assert len(sizes) > 2
    assert all(check.max_abs_error <= report.tolerance for check in report.checks)
