"""Convolutions, mixers, linear maps and residual blocks in onnxruntime: the file computes what the module computes.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import nn

from tests import captured, models
from tests.exported import hybrid
from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.deploy.export import ExportReport, export
from thesean.deploy.session import Session
from thesean.passes.capture.capture import capture
from thesean.targets import Target

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.fixture(scope="module")
def branches(tmp_path_factory) -> tuple[Any, ExportReport]:
    """A language model whose attentions are convolutions, and its file."""
    module = hybrid(captured.llama(), "conv")
    path = tmp_path_factory.mktemp("conv") / "m.onnx"
    return module, export(module, captured.llama().signature, path, train_length=30)


def check_windows(module: Any, report: ExportReport) -> None:
    """Whole sequences, chunks and single steps were compared by the export itself."""
    assert report.stateful
    assert report.inputs[1:] == ("state_in_0", "state_in_1")
    assert (3, 20) in [c.shape for c in report.checks]
    assert {"chunks in onnxruntime vs whole", "chunks in torch vs whole"} <= {c.label for c in report.checks}
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    state = next(i for i in onnx.load(report.path).graph.input if i.name == "state_in_0")
    memory = module.part_0.memory
    assert [d.dim_param or d.dim_value for d in state.type.tensor_type.shape.dim] == [
        "batch", memory, module.part_0.width,
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_convolutional_language_model_is_exported_with_its_windows_as_state(branches):
    module, report = branches
    assert report.inputs[0] == "input_ids"
    check_windows(module, report)


@pytest.mark.thorough
def test_dilated_convolutions_in_place_of_whole_parts_are_exported_with_their_windows_as_state(tmp_path):
    guide = captured.token_mixer()
    module = hybrid(guide, Target("conv", kernel=3, dilations=[1, 2], scope="part"))
    check_windows(module, export(module, guide.signature, tmp_path / "m.onnx", train_length=30))


@pytest.mark.thorough
def test_one_file_prefills_in_chunks_and_goes_on_step_by_step(branches):
    module, report = branches
    session = Session(report.path)
    ids = models.tokens(2, 15)
    with torch.no_grad():
        whole = module(input_ids=ids)["logits"]
    states, found = None, []
    for chunk in ids.split((6, 5, 1, 1, 1, 1), 1):
        out, states = session.run({"input_ids": chunk.numpy()}, states)
        found.append(torch.from_numpy(out["logits"]))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_an_encoder_is_exported_at_every_length(tmp_path):
    module = hybrid(captured.encoder(), {"*layers.0*": "linear", "*layers.1*": "conv"})
    report = export(module, captured.encoder().signature, tmp_path / "m.onnx")
    assert {(2, 7), (2, 19), (5, 3), (1, 1)} <= {c.shape for c in report.checks}
    assert max(c.max_abs_error for c in report.checks) < 1e-5


@pytest.mark.thorough
def test_a_mixer_is_exported_for_its_one_length(tmp_path):
    module = hybrid(captured.fixed_length(), "mixer")
    report = export(module, captured.fixed_length().signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert max(c.max_abs_error for c in report.checks) < 1e-5


# every family once where the size stays and once in blocks.2, 4 or 6, which halve it
IN_BLOCKS = ["conv", "resnet-block", "conv", "linear", "resnet-block", "conv", "linear", "resnet-block"]


@pytest.mark.thorough
def test_a_residual_network_is_exported_at_every_batch(tmp_path):
    guide = capture(models.resnet(channels=(4, 8, 8, 8)), models.vectors(3, 1, 8, 8))
    module = hybrid(guide, {f"blocks.{k}": name for k, name in enumerate(IN_BLOCKS)})
    report = export(module, guide.signature, tmp_path / "m.onnx")
    assert [c.shape for c in report.checks] == [(1,), (2,), (5,)]
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert "Unfold" not in {n.op_type for n in onnx.load(report.path).graph.node}


@pytest.mark.thorough
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
    guide = capture(nn.Sequential(nn.Conv2d(3, 3, 1), module).eval(), models.vectors(3, 3, *size_in))
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert max(c.max_abs_error for c in report.checks) < 1e-5
