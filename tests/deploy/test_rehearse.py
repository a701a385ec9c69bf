"""What no export can write is known before anything trains; what it can is not warned of.

B batch, T time, D width
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.exported import hybrid
from tests.models import seeded
from thesean.deploy import rehearse
from thesean.deploy.export import export
from thesean.deploy.rehearse import unwritable
from thesean.errors import ExportError
from thesean.passes.capture.capture import capture


@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert, captured.llama, captured.resnet, captured.tabled])
def test_what_exports_is_not_warned_of_and_costs_no_table(guide, monkeypatch):
    monkeypatch.setattr(rehearse, "is_registered", None)
    assert unwritable(guide().graph_module) == ""


def test_sizes_that_are_free_stay_free():
    """torch asks how a convolution's output lies in memory, and what it is told holds for all that shares the sizes."""
    found = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d(1)).eval(), torch.randn(2, 3, 8, 8)).graph_module
    (images,) = found.graph.find_nodes(op="placeholder")
    assert unwritable(found) == ""
    assert str(images.meta["val"].shape[0]) in found.meta["symbols"]


class Spectrogram(nn.Module):
    """wave_BS -> (B, classes), by its spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.window: torch.Tensor
        self.register_buffer("window", torch.hann_window(16))
        self.read = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(wave, 16, 8, window=self.window, return_complex=True).abs()
        return self.read(spectrum.mT).mean(1)


def test_a_spectrogram_is_written_and_saved(tmp_path):
    guide = seeded(Spectrogram)
    converted = thesean.compile(guide, "keep", data=[models.vectors(4, 64)], progress=False)
    assert not any("ONNX" in note or "saved" in note for note in converted.report.notes)
    converted.save(tmp_path / "kept")
    wave = models.vectors(3, 64, seed=1)
    assert torch.equal(thesean.load(tmp_path / "kept").module(wave), converted.module(wave))
    assert converted.export(tmp_path / "m.onnx").checks


def test_replaced_parts_are_what_they_are_in_the_file():
    assert unwritable(hybrid(captured.gpt2(), "mingru")) == ""


def test_an_operator_without_a_form_is_named_with_its_part():
    class Running(nn.Module):
        def __init__(self, read: int) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Identity())
            self.read = read

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cummax(self.inner(x), 1)[self.read].float()

    values, places = (capture(Running(read).eval(), models.vectors(3, 5, 6)).graph_module for read in (0, 1))
    assert unwritable(places).startswith("no ONNX form is known of aten.cummax.default: an export will fail there")
    assert unwritable(values) == ""


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


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 6, proj_size=4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.lgamma(x.abs()), "aten.lgamma.default"),
        (lambda x: torch.erfinv(x.tanh()), "aten.erfinv.default"),
        (lambda x: torch.digamma(x.abs()), "aten.digamma.default"),
        (lambda x: x.cumprod(0), "aten.cumprod.default"),
        (lambda x: torch.special.i0(x), "special_i0.default"),
        (lambda x: torch.gcd(x.long(), x.long() + 4), "aten.gcd.default"),
        (lambda x: torch.linalg.inv(x.mT @ x + torch.eye(6)), "aten.linalg_inv.default"),
        (lambda x: torch.linalg.eigh(x.mT @ x)[0], "eigh"),
        (lambda x: torch.linalg.eigvals(x.mT @ x).abs(), "eig"),
        (lambda x: x.mode(1)[0], "aten.mode.default"),
    ],
)
def test_what_torch_takes_apart_to_what_has_no_form_is_named(function, named):
    assert named in unwritable(capture(models.Calling(function), models.vectors(3, 5, 6)).graph_module)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own
def test_a_cell_with_projections_is_named():
    found = capture(models.seeded(Projected), models.vectors(3, 5, 6))
    assert unwritable(found.graph_module).startswith("no ONNX form is known of aten.lstm.input in cell")


def every_other_kind(x: torch.Tensor) -> torch.Tensor:
    """What torch takes apart to operators with a form, some of them by writing into memory."""
    parts = [
        x.quantile(0.3, -1), x.nanmean(-1), torch.std_mean(x, -1)[0], x.aminmax(dim=-1)[0], x.logcumsumexp(-1)[..., 0],
        torch.special.erfcx(x.sigmoid())[..., 0], torch.float_power(x.abs(), 2.0)[..., 0].float(), x.diff(n=2)[..., 0],
        torch.nn.functional.softmin(x, -1)[..., 0], torch.linalg.matrix_norm(x)[:, None], torch.trapezoid(x),
        torch.lstm_cell(x[:, 0], [x[:, 1], x[:, 2]], x.new_ones(24, 6), x.new_ones(24, 6))[0][:, :1],
    ]  # fmt: skip
    return torch.stack([part.expand(x.shape[:2]) for part in parts]).sum(0)


def test_what_torch_takes_apart_to_what_has_a_form_is_not_warned_of():
    assert unwritable(capture(models.Calling(every_other_kind), models.vectors(3, 5, 6)).graph_module) == ""


@pytest.mark.slow
def test_what_torch_takes_apart_to_what_has_a_form_is_exported(tmp_path):
    found = capture(models.Calling(every_other_kind), models.vectors(3, 5, 6))
    assert export(found.graph_module, found.signature, tmp_path / "m.onnx").checks


class Shifted(nn.Module):
    """x_BTD with its steps in another order, by as many as there are or by as many as is said."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "centre":
            return torch.fft.fftshift(x, dim=1)
        if self.how == "centre features":
            return torch.fft.fftshift(x, dim=2)
        return torch.roll(x, x.shape[1] // 3 if self.how == "third" else 2, 1)


@pytest.mark.parametrize(
    ("how", "fails"), [("centre", True), ("centre features", False), ("third", True), ("2", False)]
)
def test_what_torch_takes_apart_and_can_not_write_then_is_named(how, fails, tmp_path):
    guide = capture(Shifted(how), models.vectors(3, 6, 6))
    assert bool(unwritable(guide.graph_module)) == fails
    try:
        export(guide.graph_module, guide.signature, tmp_path / "shifted.onnx")
    except ExportError:
        assert fails
    else:
        assert not fails  # else torch writes it by now
