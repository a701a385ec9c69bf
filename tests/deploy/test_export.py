"""The file computes what the torch module computes, or there is no file.

B batch, T time, D width
"""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import thesean
from tests import captured, exported, models
from tests.exported import hybrid
from thesean.deploy import parity
from thesean.deploy.describe_file import describe_file
from thesean.deploy.export import ExportReport, export
from thesean.deploy.export_passes import for_export
from thesean.deploy.lowering import to_onnx as exporter
from thesean.deploy.parity import Check, allowed_error, rounding
from thesean.deploy.relative_error import relative_error
from thesean.deploy.session import Session
from thesean.errors import ExportError, MissingExtraError, WriteError
from thesean.passes.analyse.chunks import cut
from thesean.passes.base import Attempt
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture

SIZES = [(2, 7), (2, 19), (5, 3), (1, 1)]


@contextmanager
def full_disk() -> Iterator[None]:
    """Past a thousand bytes a write fails, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def dims(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.fixture(scope="module")
def gru():
    """A small hybrid with one state, for what does not depend on the network."""
    guide = capture(models.token_mixer(layers=1), models.vectors(3, 6, 8))
    return hybrid(guide, "gru"), guide


def check_stateful(report: ExportReport) -> None:
    """Of a hybrid of `captured.gpt2` with two states, exported with a training length of 30."""
    assert report.stateful
    assert report.note == ""
    assert report.inputs == ("input_ids", "state_in_0", "state_in_1", "state_in_2")
    assert report.outputs == ("logits", "state_out_0", "state_out_1", "state_out_2")
    chunks = [(3, 20), (3, 20), (1, 66), (1, 66)]  # 66 is past the bound of the positions
    assert [c.shape for c in report.checks] == [*SIZES, (1, 120), *chunks]  # 120 is past the guide's table
    assert {c.label for c in report.checks[-4:]} == {"chunks in onnxruntime vs whole", "chunks in torch vs whole"}
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert report.bytes == report.path.stat().st_size
    assert "with state" in str(report)


def test_a_converted_language_model_is_stateful_and_equals_torch_at_every_size():
    check_stateful(exported.gpt2_gru().report)


@pytest.mark.thorough
@pytest.mark.parametrize("targets", [("elman", "mingru"), ("lstm", "rnn"), ("delta", "reservoir")])
def test_so_is_one_with_two_kinds_of_recurrence(tmp_path, targets):
    """Every kind that carries one state is in one of the files."""
    guide = captured.gpt2()
    module = hybrid(guide, dict(zip(("*.h.0*", "*.h.1*"), targets, strict=True)))
    assert BoundPositions()(module).modified
    check_stateful(export(module, guide.signature, tmp_path / "m.onnx", train_length=30, operators="fused"))
    assert leftovers(tmp_path) == ["m.onnx"]


@pytest.mark.thorough
def test_a_part_with_two_states_has_both_in_the_file(tmp_path):
    guide = captured.gpt2(layers=1)
    module = hybrid(guide, thesean.Target("ssm", state=3))
    assert BoundPositions()(module).modified
    report = export(module, guide.signature, tmp_path / "m.onnx", stateful="yes", train_length=30)
    assert report.inputs == ("input_ids", *(f"state_in_{k}" for k in range(3)))
    assert report.outputs == ("logits", *(f"state_out_{k}" for k in range(3)))
    found = dims(report.path)
    assert found["state_in_0"] == found["state_out_0"] == ["batch", 3, 16]  # what the convolution still reads
    assert found["state_in_1"] == found["state_out_1"] == ["batch", 1, 3, 16]  # heads, states, channels
    assert found["state_in_2"] == found["state_out_2"] == ["batch"]  # positions
    assert max(c.max_abs_error for c in report.checks) < 1e-5


def test_dimensions_are_named_and_no_path_of_this_machine_is_in_the_file():
    path = exported.gpt2_gru().path
    found = dims(path)
    assert found["input_ids"] == ["batch", "time"]
    assert found["logits"] == ["batch", "time", models.VOCABULARY]
    assert found["state_in_0"] == found["state_out_0"] == ["batch", 16]
    assert found["state_in_2"] == found["state_out_2"] == ["batch"]
    content = path.read_bytes()
    assert str(Path(exporter.__file__).parents[2]).encode() not in content
    assert b"site-packages" not in content
    assert b"pkg.torch" not in content  # nor any other note of the exporter's, which are half of a small file


def test_the_module_its_flags_and_an_earlier_choice_of_threads_stay_as_they_were(gru, tmp_path):
    module, guide = copy.deepcopy(gru[0]), gru[1]
    module.train()
    before, nodes = models.state_of(module), [n.format_node() for n in module.graph.nodes]
    export(module, guide.signature, tmp_path / "m.onnx")
    assert models.same_state(module, before)
    assert module.training
    assert [n.format_node() for n in module.graph.nodes] == nodes
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.thorough
def test_a_hybrid_whose_other_part_looks_ahead_is_exported_without_state_and_says_why(tmp_path):
    guide = captured.bert()
    module = hybrid(guide, {"*.0": thesean.Target("gru", causal=True), "*.1": "keep"})
    report = export(module, guide.signature, tmp_path / "m.onnx", train_length=40)
    assert not report.stateful
    assert report.note.startswith("without state: encoder.layer.1.attention")
    assert [c.shape for c in report.checks] == [*SIZES, (1, 64)]  # the table ends before 4 * 40
    with pytest.raises(ExportError, match=r"a stateful export is not possible: .*encoder\.layer\.1\.attention"):
        export(module, guide.signature, tmp_path / "no.onnx", stateful=True)
    assert leftovers(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("stateful", [True, False, None])
def test_what_export_runs_is_one_list(gru, stateful):
    steps = for_export(gru[1].signature, (), stateful)
    names = [p.name for s in steps for p in (s.passes if isinstance(s, Attempt) else (s,))]
    remembering = ["cache-latents", "inline-modules", "cache-attention", "cache-steps", "carry-sums", "carry-cells"]
    state = [*remembering, "memories-as-modules", "delay-steps", "thread-state"]
    as_modules = ["folds-as-modules", "memories-as-modules"]
    rest = ["write-out-attention", "write-out-for-onnx", *as_modules, "flatten-outputs", "cells-as-modules"]
    assert names == ["slices-of-joins"] + ([] if stateful is False else state) + rest
    assert isinstance(steps[1], Attempt) == (stateful is None)


@pytest.mark.thorough
def test_no_state_is_threaded_when_none_is_wanted(gru, tmp_path):
    module, guide = gru
    assert export(module, guide.signature, tmp_path / "yes.onnx").stateful
    report = export(module, guide.signature, tmp_path / "m.onnx", stateful="no")
    assert not report.stateful
    assert report.inputs == ("x",)
    assert report.outputs == ("output",)


@pytest.mark.thorough
def test_an_encoder_with_a_mask_keeps_its_keys_and_its_mask_works(tmp_path):
    ids, guide = models.tokens(), captured.bert()
    module = hybrid(guide, "gru", 1)
    report = export(module, guide.signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert report.inputs == ("input_ids", "attention_mask")
    assert report.outputs == ("last_hidden_state",)
    session, mask = Session(report.path), torch.ones_like(ids)
    mask[:, -3:] = 0
    padded, _ = session.run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected: Any = module(input_ids=ids, attention_mask=mask)
        visible: Any = module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert relative_error(padded["last_hidden_state"], expected["last_hidden_state"].numpy()) < 1e-5
    assert relative_error(padded["last_hidden_state"], visible["last_hidden_state"].numpy()) > 1e-3


@pytest.mark.thorough
def test_a_converted_residual_network_is_checked_at_several_batches(tmp_path):
    report = export(hybrid(captured.resnet(), "mlp"), captured.resnet().signature, tmp_path / "m.onnx")
    assert [c.shape for c in report.checks] == [(1,), (2,), (5,)]
    assert dims(report.path) == {"image": ["batch", 1, 8, 8], "output": ["batch", 5]}
    assert "none" in report.note


def test_nested_outputs_are_named_by_their_keys(tmp_path):
    guide = capture(models.seeded(models.TwoOutputs), {"x": models.vectors(2, 8)})
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert report.outputs == ("first", "second.0", "second.1")


class Same(nn.Module):
    """Returns one tensor under two names, and its input under the input's own."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(x)
        return {"a": y, "b": y, "x": x}


def test_one_tensor_under_two_names_and_an_input_as_output_are_kept_apart(tmp_path):
    guide = capture(Same().eval(), {"x": models.vectors(2, 8)})
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert report.outputs == ("a", "b", "x_out")


@pytest.mark.parametrize("opset", [18, pytest.param(22, marks=pytest.mark.thorough)])
def test_the_opset_is_the_one_that_was_asked_for(gru, tmp_path, opset):
    module, guide = gru
    report = export(module, guide.signature, tmp_path / "m.onnx", opset=opset)
    assert report.opset == opset
    assert next(o.version for o in onnx.load(report.path).opset_import if o.domain == "") == opset


@pytest.mark.thorough
def test_an_opset_that_can_not_be_written_leaves_no_file(gru, tmp_path):
    module, guide = gru
    with pytest.raises(ExportError, match=r"opset: expected a whole number from 18 to \d+, found 99"):
        export(module, guide.signature, tmp_path / "m.onnx", opset=99)
    assert leftovers(tmp_path) == []


def test_numbers_that_differ_leave_an_earlier_file_as_it_was(gru, tmp_path, monkeypatch):
    module, guide = gru
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")

    def altered(graph_module, *rest):
        other = copy.deepcopy(graph_module)
        with torch.no_grad():
            other.part_0.last.weight.mul_(1.1)
        return exporter.to_onnx(other, *rest)

    monkeypatch.setattr("thesean.deploy.export.to_onnx", altered)
    with pytest.raises(ExportError, match=r"at most 1e-04 of the output's scale, found \d.*Try another opset="):
        export(module, guide.signature, path)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.onnx"]


class Chaotic(nn.Module):
    """Each step doubles what rounding left, sixty times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sigmoid()
        for _ in range(60):
            x = 3.99 * x * (1 - x)
        return x


def test_a_network_that_amplifies_rounding_is_told_as_such(tmp_path):
    guide = capture(Chaotic().eval(), {"x": models.vectors(2, 4)})
    with pytest.raises(ExportError, match=r"The network itself is led \d.* away from what .* in float64"):
        export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert leftovers(tmp_path) == []


class Amplifies(nn.Module):
    """x near 1 against a matrix: what is left of it is rounding and 1e-4 of x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight * (1 + 1e-4 * torch.randn(64, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3e2 * (self.first(x) - self.second(x))


def test_rounding_is_what_any_order_of_sums_may_lead_to():
    torch.manual_seed(0)
    guide = capture(Amplifies().eval(), {"x": torch.randn(4, 64)})
    before = models.state_of(guide.graph_module)
    calm = capture(models.mlp(), models.vectors(4, 8))
    found, usual = (rounding(g.graph_module, g.signature, (2,)) for g in (guide, calm))
    assert found > 20 * usual > 0
    assert models.same_state(guide.graph_module, before)
    by_itself = rounding(guide.graph_module, guide.signature, (2,), enough=0.0)  # no weights are drawn
    assert 0 < by_itself <= rounding(guide.graph_module, guide.signature, (2,), enough=1.01 * by_itself) <= found
    wide = capture(Amplifies().double().eval(), {"x": torch.randn(4, 64).double()})
    before = models.state_of(wide.graph_module)
    rounding(wide.graph_module, wide.signature, (2,))
    assert models.same_state(wide.graph_module, before)  # its weights needn't be cast, and are still not written into


def held_to(error: float, own: float, asked: bool = False) -> tuple[float, str]:
    checks = [Check("onnxruntime vs torch", (1, 7), e) for e in (error / 2, error, float("nan"))]
    return allowed_error(checks, 1e-4, Path("m.onnx"), lambda shape, _: own * (shape == (1, 7)), asked=asked)


def test_a_file_is_as_far_from_torch_as_torch_from_float64_where_rounding_is_amplified():
    assert held_to(0.9e-4, 5e-3) == (1e-4, "")
    allowed, note = held_to(1.8e-4, 1.5e-4)
    assert allowed == pytest.approx(6e-4)
    assert note == (
        "the network itself is led 1.5e-04 away from what it computes in float64 by rounding, which it amplifies, and "
        "the file is held to 4 times that"
    )
    allowed, note = held_to(1.7e-4, 3.7e-4)  # nearer to torch than torch is to float64
    assert allowed == pytest.approx(1e-3)
    assert note.endswith("the file is held to 1e-03")
    for error, own, advice in ((1.8e-4, 1e-5, "Try another"), (3e-4, 6e-5, "The network"), (1.1e-3, 3e-4, "raise")):
        with pytest.raises(ExportError, match=advice):
            held_to(error, own)
    with pytest.raises(ExportError, match="an error of at most 1e-04"):
        held_to(1.8e-4, 1.5e-4, asked=True)


def test_an_interruption_leaves_an_earlier_file_as_it_was(gru, tmp_path, monkeypatch):
    module, guide = gru
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("thesean.deploy.export._compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(module, guide.signature, path)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.onnx"]


class Unwritable(nn.Module):
    """ONNX has no operator for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x @ x.transpose(1, 2)).real


def test_what_onnx_can_not_write_is_told_and_leaves_no_file(tmp_path):
    guide = capture(Unwritable().eval(), {"x": models.vectors(2, 4, 4)})
    with pytest.raises(ExportError, match=r"torch's exporter can't write this graph at opset 20: .*eig"):
        export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    assert leftovers(tmp_path) == []


def test_a_place_that_can_not_be_written_is_told_before_anything_is_exported(gru, tmp_path, monkeypatch):
    module, guide = gru
    monkeypatch.setattr("thesean.deploy.export.to_onnx", None)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match=r"can't write .*Choose a writable folder"):
        export(module, guide.signature, tmp_path / "file" / "m.onnx")
    with pytest.raises(ExportError, match="is a folder; expected a file's name"):
        export(module, guide.signature, tmp_path)


def test_a_missing_package_is_named_with_its_extra(gru, tmp_path, monkeypatch):
    module, guide = gru
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnxscript is not installed.*thesean-compiler\[onnx\]"):
        export(module, guide.signature, tmp_path / "m.onnx")


def test_weights_that_one_file_can_not_hold_are_beside_it(gru, tmp_path, monkeypatch):
    module, guide = gru
    monkeypatch.setattr("thesean.deploy.onnx_file.LIMIT", 1000)
    report = export(module, guide.signature, tmp_path / "m.onnx", stateful=False)
    assert report.weights is not None
    assert report.weights.parent == tmp_path
    assert leftovers(tmp_path) == ["m.onnx", report.weights.name]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert f"the weights are in {report.weights.name}" in str(report)


def test_nodes_are_named_by_the_module_that_they_come_from():
    names = [n.name for n in onnx.load(exported.gpt2_gru().path).graph.node]
    assert len(set(names)) == len(names)
    assert "/transformer/h/0/ln_1/LayerNormalization" in names
    assert any(name.startswith("/transformer/h/1/mlp/c_fc/") for name in names)
    assert not any("module_stack" in name for name in names)


def test_an_unknown_wish_for_state_is_refused(gru, tmp_path):
    module, guide = gru
    with pytest.raises(ExportError, match="stateful: expected 'auto', 'yes', 'no', True or False, found 'maybe'"):
        export(module, guide.signature, tmp_path / "m.onnx", stateful="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("m.onnx", {"opset": 17}, r"opset: expected a whole number from 18 to \d+, found 17"),
        ("m.onnx", {"opset": "20"}, "found '20'"),
        ("m.onnx", {"opset": True}, "found True"),
        ("m.onnx", {"opset": 20.0}, r"found 20\.0"),
        ("m.onnx", {"dtype": [torch.float16]}, "dtype: expected torch.float32 or torch.float16"),
        ("m.onnx", {"stateful": ["yes"]}, r"stateful: expected 'auto', .*found \['yes'\]"),
        ("m.onnx", {"external_data": "beside"}, "external_data: expected True, False or None, found 'beside'"),
        ("m.pth", {}, r"expected a name that ends in \.onnx or \.pt2, found \.pth"),
        ("m.SafeTensors", {}, r"found \.SafeTensors"),
        ("m.PT2", {}, r"found \.PT2"),
        ("m.onnx", {"runtime": "genai"}, r"m\.onnx: runtime='genai' makes a folder"),
    ],
)
def test_what_means_nothing_is_told_before_anything_is_made(tmp_path, name, asked, told):
    guide = captured.mlp()
    with pytest.raises(ExportError, match=told):
        export(guide.graph_module, guide.signature, tmp_path / name, **asked)
    assert leftovers(tmp_path) == []


def test_the_newest_opset_is_written(tmp_path):
    latest = onnx.defs.onnx_opset_version()
    report = thesean.export_guide(models.gpt2(1), tmp_path / "m.onnx", data=models.token_batches(), opset=latest)
    assert report.opset == latest
    assert dims(report.path)["input_ids"] == ["batch", "time"]


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.25),  # of a scale of 2
        ([0.1, 0.2], [0.1, 0.1], 0.1),  # small outputs are not blown up
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0),
        ([float("nan"), 1.0], [0.0, 1.0], float("inf")),
        ([float("inf"), 1.0], [0.0, 1.0], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
@pytest.mark.parametrize("piece", [2**20, 1], ids=["at once", "one by one"])
def test_the_error_is_relative_to_the_outputs_scale(found, expected, error, piece, monkeypatch):
    monkeypatch.setattr("thesean.deploy.relative_error._PIECE", piece)
    assert relative_error(np.array(found), np.array(expected)) == pytest.approx(error)


def test_large_outputs_are_compared_in_little_memory():
    """The logits of a few thousand tokens weigh more than the network: no copy of all of them in float64."""
    found, expected = np.zeros(2**23, np.float32), np.ones(2**23, np.float32)
    tracemalloc.start()
    assert relative_error(found, expected) == 1.0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < found.nbytes * 2


def test_nan_against_nan_is_no_comparison():
    nothing = np.array([float("nan"), float("-inf")])
    assert relative_error(np.zeros(0), np.zeros(0)) == 0.0
    assert np.isnan(relative_error(nothing, nothing))
    assert relative_error(np.append(nothing, 3.0), np.append(nothing, 4.0)) == pytest.approx(0.25)
    nan, inf = float("nan"), float("inf")
    assert parity.Check.of("all", (1,), ("a", "b", "c"), (0.5, nan, inf)) == ("all", (1,), inf, ("b",))
    void = parity.Check.of("all", (1,), ("a",), (nan,))
    assert np.isnan(void.max_abs_error)
    assert parity.largest([void]) == parity.largest([]) == "nothing could be compared"
    assert parity.largest([void, parity.Check("whole", (2, 7), 0.5)]) == "largest error 5.0e-01 (whole at (2, 7))"


def test_a_file_is_not_written_where_the_module_gives_no_numbers(gru, tmp_path):
    module, guide = gru
    broken = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ExportError, match="expected finite numbers to compare, found none"):
        export(broken, guide.signature, tmp_path / "m.onnx", stateful=False)
    assert leftovers(tmp_path) == []
    report = export(broken, guide.signature, tmp_path / "m.onnx", stateful=False, check="skip")
    assert "nothing could be compared" in str(report)


class HalfVoid(nn.Module):
    """Two outputs, of which one holds no number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"good": self.layer(x), "void": self.layer(x).abs().neg().log()}


def test_what_can_not_be_compared_is_written_where_the_caller_says_so_and_told(tmp_path):
    torch.manual_seed(0)
    guide, path = HalfVoid(), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"found none in the torch module's own void\. .*check='skip'"):
        thesean.export_guide(guide, path, example_inputs=(models.vectors(4, 8),))
    assert leftovers(tmp_path) == []
    report = thesean.export_guide(guide, path, example_inputs=(models.vectors(4, 8),), check="skip")
    assert "not checked, as check='skip' allows: onnxruntime vs torch at (1,)" in report.note
    assert max(c.max_abs_error for c in report.checks) < 1e-5  # of the other output
    assert "not checked: onnxruntime vs torch at (1,)" in describe_file(path)[0]


def test_an_output_that_can_be_compared_is_compared_all_the_same(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(parity, "_arrays", lambda inputs: {n: v.numpy() + 1 for n, v in inputs.items()})
    with pytest.raises(ExportError, match="expected an error of at most"):
        thesean.export_guide(HalfVoid(), tmp_path / "m.onnx", example_inputs=(models.vectors(4, 8),), check="skip")
    with pytest.raises(ExportError, match="check: expected one of all, skip, found 'never'"):
        thesean.export_guide(HalfVoid(), tmp_path / "m.onnx", example_inputs=(models.vectors(4, 8),), check="never")  # type: ignore[arg-type]


def test_under_a_callers_autocast_the_file_is_the_same(tmp_path):
    guide, files = models.mlp(), []
    for lower in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            thesean.export_guide(guide, tmp_path / f"{lower}.onnx", example_inputs=(models.vectors(4, 8),))
        files.append((tmp_path / f"{lower}.onnx").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(("length", "chunks"), [(20, (1, 5, 1, 13)), (7, (1, 5, 1)), (4, (1, 3)), (1, (1,))])
def test_chunks_fill_the_length(length, chunks):
    assert cut(length, parity._CHUNKS) == chunks
