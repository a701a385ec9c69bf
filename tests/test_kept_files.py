"""A file of an equal graph is what writing it anew would give, and equal is nothing less than that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
import torch

from tests import captured
from tests.kept_files import KeptFiles
from thesean.deploy.export import export
from thesean.deploy.export_passes import for_export
from thesean.deploy.lowering.to_onnx import to_onnx
from thesean.passes.base import run_passes
from thesean.passes.capture.captured import Captured
from thesean.passes.freeze_on_cpu import FreezeOnCpu

pytest.importorskip("onnxscript")


@pytest.fixture
def kept() -> tuple[KeptFiles, list[Any]]:
    """And what was written."""
    made: list[Any] = []

    def counted(graph_module, *rest):
        made.append(graph_module)
        return to_onnx(graph_module, *rest)

    return KeptFiles(counted), made


def ready(guide: Captured) -> tuple[Any, ...]:
    """What `export` hands to `to_onnx`."""
    lowered, _ = run_passes(guide.graph_module, FreezeOnCpu(), *for_export(guide.signature, (), stateful=False))
    example = guide.signature.random_inputs({s: 2 + 5 * (s == "time") for s in guide.signature.symbols})
    return lowered, example, guide.signature.inputs, ("output",), 18


def test_an_equal_graph_is_not_written_again_and_its_model_is_the_callers_own(kept):
    files, made = kept
    first, second = (ready(captured.mlp()) for _ in range(2))
    assert first[0] is not second[0]
    written = ir.to_proto(files(*first)).SerializeToString()
    model = files(*second)
    assert len(made) == 1
    assert ir.to_proto(model).SerializeToString() == written
    model.graph.name = "altered"
    model.graph.initializers.clear()
    with torch.no_grad():
        for weight in first[0].parameters():
            weight.data = 2 * weight  # in place it would be the captured guide's
    assert ir.to_proto(files(*second)).SerializeToString() == written
    assert len(made) == 1


def test_what_differs_in_anything_is_written(kept):
    files, made = kept
    graph_module, example, inputs, outputs, opset = ready(captured.mlp())
    files(graph_module, example, inputs, outputs, opset)
    files(graph_module, example, inputs, outputs, 20)
    files(graph_module, example, inputs, ("logits",), opset)
    files(graph_module, example, inputs, outputs, opset, True)
    fixed = tuple(replace(spec, shape=tuple(example[spec.name].shape)) for spec in inputs)
    files(graph_module, example, fixed, outputs, opset)
    elsewhere, changed = ready(captured.mlp())[0], ready(captured.mlp())[0]
    for node in elsewhere.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {k: (f"inner.{path}", kind) for k, (path, kind) in stack.items()}
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-6
    for other in (elsewhere, changed):
        files(other, example, inputs, outputs, opset)
    assert len(made) == 7
    files(graph_module, example, inputs, outputs, opset)
    assert len(made) == 7


def test_export_goes_through_it_and_compares_all_the_same(tmp_path, monkeypatch):
    guide, seen = captured.mlp(), list[bytes]()
    reports = [export(guide.graph_module, guide.signature, tmp_path / f"{k}.onnx") for k in range(2)]
    assert reports[0].checks == reports[1].checks
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    monkeypatch.setattr("tests.kept_files._read", seen.append)
    with pytest.raises(AttributeError):  # nothing came back
        export(guide.graph_module, guide.signature, tmp_path / "2.onnx")
    assert len(seen) == 1
