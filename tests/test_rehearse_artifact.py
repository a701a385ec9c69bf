"""What could be saved and not loaded is known before anything trains, from the untrained network alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from thesean.errors import ArtifactError
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.rehearse_artifact import check_loadable


@pytest.mark.parametrize(
    ("guide", "target"), [(captured.gpt2, "mingru"), (captured.llama, "linear-attention"), (captured.gpt2, "narrow")]
)
def test_what_is_saved_and_loaded_is_not_refused(guide, target):
    bound_plan = make_plan(guide(), target)
    hybrid = build_hybrid(bound_plan)
    before = {name: value.clone() for name, value in hybrid.graph_module.state_dict().items()}
    check_loadable(hybrid.graph_module, bound_plan.captured.signature, bound_plan.plan)
    for name, value in hybrid.graph_module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_module_that_its_configuration_does_not_make_again_is_refused(monkeypatch):
    bound_plan = make_plan(captured.gpt2(), "mingru")
    module = build_hybrid(bound_plan).graph_module
    part = next(m for m in module.modules() if hasattr(m, "config"))
    told = {**part.config(), "width": part.config()["width"] + 1}
    monkeypatch.setattr(part, "config", lambda: told)
    with pytest.raises(ArtifactError, match="a target module does not fit its weights"):
        check_loadable(module, bound_plan.captured.signature, bound_plan.plan)


class Wide(nn.Module):
    """x_BTD with a spectrum of complex128, which files have no name for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_F = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.fft.irfft(torch.fft.rfft(x) * self.weight_F, n=6).float()
        return x + self.mlp(x)


def test_a_precision_that_files_do_not_have_is_refused_before_training(tmp_path):
    x = models.vectors(2, 5, 6)
    bound_plan = make_plan(capture(models.seeded(Wide), x), "narrow")
    module = build_hybrid(bound_plan).graph_module
    with pytest.raises(ArtifactError, match=r"weight_F: files have no complex128\. Convert the guide in another"):
        check_loadable(module, bound_plan.captured.signature, bound_plan.plan)
    with pytest.warns(UserWarning, match="can't be saved: weight_F: files have no complex128"):
        converted = thesean.compile(models.seeded(Wide), "narrow", data=[{"x": x}] * 3, recipe="fast", progress=False)
    assert any(note.startswith("can't be saved: weight_F: files have no complex128") for note in converted.report.notes)
    with pytest.raises(ArtifactError, match="files have no complex128"):
        converted.save(tmp_path / "saved")
