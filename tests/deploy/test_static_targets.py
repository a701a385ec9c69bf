"""Convolutions, mixers, linear maps and residual blocks in onnxruntime: the file computes what the module computes.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import nn

from tests import models
from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def converted(guide: nn.Module, inputs: Any, target: Any) -> Any:
    captured = capture(guide, inputs)
    torch.manual_seed(0)
    return build_hybrid(make_plan(captured, target)).graph_module.eval(), captured.signature


@pytest.mark.parametrize(
    "target",
    ["conv", Target("conv", kernel=3, dilations=[1, 2], scope="part")],
    ids=["branches", "dilated, whole parts"],
)
def test_a_convolutional_language_model_is_exported_with_its_windows_as_state(tmp_path, target):
    """Whole sequences, chunks and single steps are compared by the export itself."""
    module, signature = converted(models.llama(), {"input_ids": models.tokens()}, target)
    report = export(module, signature, tmp_path / "m.onnx", train_length=30)
    assert report.stateful
    assert report.inputs == ("input_ids", "state_in_0", "state_in_1")
    assert (3, 20) in [c.shape for c in report.checks]
    assert {"chunks in onnxruntime vs whole", "chunks in torch vs whole"} <= {c.label for c in report.checks}
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    state = next(i for i in onnx.load(report.path).graph.input if i.name == "state_in_0")
    memory = module.part_0.memory
    assert [d.dim_param or d.dim_value for d in state.type.tensor_type.shape.dim] == [
        "batch", memory, module.part_0.width,
    ]  # fmt: skip


def test_one_file_prefills_in_chunks_and_goes_on_step_by_step(tmp_path):
    module, signature = converted(models.llama(), {"input_ids": models.tokens()}, "conv")
    session = Session(export(module, signature, tmp_path / "m.onnx").path)
    ids = models.tokens(2, 15)
    with torch.no_grad():
        whole = module(input_ids=ids)["logits"]
    states, found = None, []
    for chunk in ids.split((6, 5, 1, 1, 1, 1), 1):
        out, states = session.run({"input_ids": chunk.numpy()}, states)
        found.append(torch.from_numpy(out["logits"]))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["linear", "conv"])
def test_an_encoder_is_exported_at_every_length(tmp_path, target):
    module, signature = converted(models.encoder(), models.vectors(3, 6, 16), target)
    report = export(module, signature, tmp_path / "m.onnx")
    assert {(2, 7), (2, 19), (5, 3), (1, 1)} <= {c.shape for c in report.checks}
    assert max(c.max_abs_error for c in report.checks) < 1e-5


def test_a_mixer_is_exported_for_its_one_length(tmp_path):
    module, signature = converted(models.FixedLength(models.token_mixer(), 6, 8), models.vectors(3, 6, 8), "mixer")
    report = export(module, signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert max(c.max_abs_error for c in report.checks) < 1e-5


@pytest.mark.parametrize("target", ["conv", "resnet-block", "linear"])
def test_a_residual_network_is_exported_at_every_batch(tmp_path, target):
    module, signature = converted(models.resnet(), models.vectors(3, 1, 8, 8), target)
    report = export(module, signature, tmp_path / "m.onnx")
    assert [c.shape for c in report.checks] == [(1,), (2,), (5,)]
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert "Unfold" not in {n.op_type for n in onnx.load(report.path).graph.node}


@pytest.mark.parametrize(
    ("name", "size_in", "size_out"),
    [
        ("conv-2d", (8, 8), (6, 6)),
        ("resnet-block", (7, 9), (4, 5)),
        ("linear", (7, 9), (4, 5)),
        ("linear", (5, 5), (1, 1)),
    ],
)
def test_odd_sizes_and_unpadded_convolutions_are_padded_and_cropped_alike(tmp_path, name, size_in, size_out):
    module = build(name, map_part((3, *size_in), (4, *size_out), nonnegative=True)).eval()
    captured = capture(nn.Sequential(nn.Conv2d(3, 3, 1), module).eval(), models.vectors(3, 3, *size_in))
    report = export(captured.graph_module, captured.signature, tmp_path / "m.onnx")
    assert max(c.max_abs_error for c in report.checks) < 1e-5
