"""A .pt2 file is torch's alone: it loads where Thesean can't be imported, and computes the same there.

B batch, T time
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import captured, exported, models
from tests.deploy.test_export import leftovers
from thesean.deploy.export import export
from thesean.errors import ExportError
from thesean.passes.thread_state import state_shape

ALONE = """
import sys
sys.modules["thesean"] = None  # an import of it fails
import torch
module = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2])
state, outputs = inputs.pop("state"), []
for chunk in inputs["ids"].split([1, 5, 1, 3], 1):
    found = module(input_ids=chunk, **dict(zip(state, list(state.values()))))
    outputs.append(found[0])
    state = dict(zip(state, found[1:]))
torch.save(torch.cat(outputs, 1), sys.argv[3])
"""


@pytest.mark.parametrize(
    "target",
    [
        "keep",
        pytest.param(thesean.Target("linear-attention", window=0), marks=pytest.mark.thorough),
    ],
)
def test_it_streams_in_chunks_where_thesean_can_not_be_imported(target: Any, tmp_path: Path) -> None:
    guide, ids = captured.gpt2(), models.tokens()
    module = guide.graph_module if target == "keep" else exported.hybrid(guide, target)
    report = export(module, guide.signature, tmp_path / "m.pt2")
    assert report.stateful
    assert {c.label for c in report.checks} == {"the file vs torch", "chunks in the file vs whole"}
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert "a graph of torch's, with state" in str(report)
    program = torch.export.load(str(report.path))
    shapes = {
        n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name.startswith("state_in_")
    }
    state = {
        n: torch.zeros(
            state_shape(
                [d if isinstance(d, int) else ("batch" if k == 0 else "past") for k, d in enumerate(v.shape)],
                len(ids),
                0,
            ),
            dtype=v.dtype,
        )
        for n, v in shapes.items()
    }
    assert [n for n in report.inputs if n.startswith("state_in_")] == list(state)
    torch.save({"ids": ids, "state": state}, tmp_path / "inputs.pt")
    places = [str(tmp_path / n) for n in ("m.pt2", "inputs.pt", "found.pt")]
    done = subprocess.run([sys.executable, "-c", ALONE, *places], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = module.eval()(input_ids=ids)["logits"]
    torch.testing.assert_close(torch.load(places[2]), expected, atol=1e-5, rtol=1e-4)


def test_what_carries_no_state_is_written_too_and_takes_any_batch(tmp_path: Path) -> None:
    report = thesean.export_guide(models.resnet(), tmp_path / "m.pt2", example_inputs=(models.vectors(3, 1, 8, 8),))
    assert not report.stateful
    assert [c.shape for c in report.checks] == [(1,), (2,), (5,)]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("gru", r"torch can't write this graph for every size: .*write an \.onnx file"),
        # its kernel compares a batch with the heads, and torch takes the answer for one of all batches
        (thesean.Target("linear-attention", window=4), "the file does not run where the module does: Guard failed"),
        ("ssm", "the file does not run where the module does: Guard failed"),  # its blocks of 16 steps
    ],
)
def test_what_torch_can_not_write_for_every_size_is_refused_and_leaves_an_earlier_file_as_it_was(
    target: Any, told: str, tmp_path: Path
) -> None:
    guide, path = captured.gpt2(), tmp_path / "m.pt2"
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError, match=told):
        export(exported.hybrid(guide, target), guide.signature, path)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.pt2"]


@pytest.mark.parametrize("asked", [{"opset": 21}, {"dtype": "float16"}, {"external_data": True}, {"check": "skip"}])
def test_what_is_said_of_onnx_alone_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    guide = captured.mlp()
    with pytest.raises(ExportError, match=f"{next(iter(asked))} is for ONNX files alone"):
        export(guide.graph_module, guide.signature, tmp_path / "m.pt2", **asked)
    assert leftovers(tmp_path) == []
