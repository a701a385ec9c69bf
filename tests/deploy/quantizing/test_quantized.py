"""A quantised file is smaller, near to the exact one, a stream like it, and says all of that.

B batch, T time
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import thesean
from tests import captured, exported, models
from tests.deploy.test_export import leftovers
from thesean.converted import Converted
from thesean.deploy.export import export
from thesean.deploy.export_report import ExportReport
from thesean.deploy.onnx_file import metadata
from thesean.deploy.quantizing.quantized import QUANTIZED, Quantized
from thesean.deploy.quantizing.tools import Quantize
from thesean.deploy.relative_error import relative_error
from thesean.deploy.session import Session
from thesean.errors import DataError, ExportError
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture
from thesean.samples import samples_of

FORMS = get_args(Quantize)
OPERATORS = {"int8": "MatMulInteger", "int8-static": "QuantizeLinear", "int4": "MatMulNBits"}


def gpt2(path: Path, form: Any, layers: int = 2, **asked: Any) -> ExportReport:
    guide = captured.gpt2(layers=layers)
    module = exported.hybrid(guide, "gru")
    BoundPositions()(module)
    samples = samples_of(models.token_batches(8), guide.signature)
    return export(module, guide.signature, path, quantize=form, samples=samples, **asked)


def figures(report: ExportReport) -> Quantized:
    assert report.quantized is not None
    return report.quantized


class Files(dict[str, ExportReport]):
    """A file of each form that is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, form: str) -> ExportReport:
        self[form] = gpt2(self.folder / f"{form}.onnx", form)
        return self[form]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("quantized"))


# one while one works
EACH = pytest.mark.parametrize(
    "form", [f if f == "int4" else pytest.param(f, marks=pytest.mark.thorough) for f in FORMS]
)


@EACH
def test_its_products_hold_whole_numbers_and_the_report_tells_what_that_costs(
    files: dict[str, ExportReport], form: str
) -> None:
    report, made = files[form], figures(files[form])
    operators = Counter(n.op_type for n in onnx.load(report.path).graph.node)
    assert operators[OPERATORS[form]] >= made.products > 0
    assert made.form == form
    assert report.bytes == report.path.stat().st_size < made.exact_bytes
    assert made.exact_bytes == pytest.approx(exported.gpt2_gru().report.bytes, rel=0.05)
    assert 0 < made.share < 1  # the embedding stays as it is
    assert 0 < made.divergence < 0.05
    assert made.unit == "nats"
    assert made.agreement is not None
    assert 0.5 < made.agreement <= 1
    assert min(*made.whole_ms, *(made.step_ms or ())) > 0
    assert made.samples == "the last 2 batches of data"
    assert made.calibrated == (0 if form == "int8" else 6)
    assert form in str(report)
    assert "nats, the same answer at" in str(report)


@EACH
def test_its_figures_are_those_of_the_two_files(files: dict[str, ExportReport], form: str) -> None:
    """Divergence and agreement once more, from the exact file that a test of its own wrote."""
    made = figures(files[form])
    held_out = [b["input_ids"].numpy() for b in models.token_batches(8)[-2:]]
    exact, whole = exported.gpt2_gru().session, Session(files[form].path)
    pairs = [[s.run({"input_ids": ids})[0]["logits"] for s in (exact, whole)] for ids in held_out]
    divergences, same = [], []
    for expected, found in pairs:
        p, q = (torch.from_numpy(v).log_softmax(-1) for v in (expected, found))
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append((expected.argmax(-1) == found.argmax(-1)).mean())
    assert made.divergence == pytest.approx(np.mean(divergences), rel=1e-3)
    assert made.agreement == pytest.approx(np.mean(same))


@EACH
def test_it_is_a_stream_as_the_exact_file_is(files: dict[str, ExportReport], form: str) -> None:
    report = files[form]
    assert report.stateful
    ways = {"onnxruntime vs torch", "chunks in onnxruntime vs whole", "quantised vs exact"}
    assert {c.label for c in report.checks} == ways
    session, ids = Session(report.path), models.tokens().numpy()
    whole, after = session.run({"input_ids": ids})
    first, state = session.run({"input_ids": ids[:, :5]})
    rest, state = session.run({"input_ids": ids[:, 5:]}, state)
    joined = np.concatenate([first["logits"], rest["logits"]], 1)
    # one scale a call makes chunks differ; a scale that is known beforehand, or is a row's own, does not
    bar = 0.05 if form == "int8" else 1e-5
    assert relative_error(joined, whole["logits"]) < bar
    assert all(relative_error(state[n], after[n]) < bar for n in after)
    apart = figures(report).apart
    assert apart is not None
    assert (1e-6 < apart < 1e-2) if form == "int8" else apart < 1e-6
    assert ("one scale a call" in str(report)) == (form == "int8")


def test_it_says_so_itself_and_what_else_the_exact_file_says(files: dict[str, ExportReport]) -> None:
    told = metadata(files["int4"].path)
    assert json.loads(told[QUANTIZED])["products"] == figures(files["int4"]).products
    exact = metadata(exported.gpt2_gru().path)
    assert told.keys() == exact.keys() | {QUANTIZED}
    assert told["thesean.states"] == exact["thesean.states"]
    seen = json.loads(told["thesean.parity"])
    assert max(c["max_abs_error"] for c in seen) == max(c.max_abs_error for c in files["int4"].checks) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["keep", thesean.Target("linear-attention", window=4), "ssm"])
def test_what_stands_in_functions_and_branches_stays_as_it_is(target: Any, tmp_path: Path) -> None:
    """A kept attention's keys and values, and a window's, meet in functions; one step of a window is a branch."""
    guide = captured.gpt2(layers=1)
    module = guide.graph_module if target == "keep" else exported.hybrid(guide, target)
    samples, ids = samples_of(None, guide.signature), models.tokens().numpy()
    a = onnx.load(export(module, guide.signature, tmp_path / "exact.onnx").path)
    weights = {i.name for i in a.graph.initializer}
    products = sum(n.op_type == "MatMul" and n.input[1] in weights for n in a.graph.node)
    for form in FORMS:
        report = export(module, guide.signature, tmp_path / f"{form}.onnx", quantize=form, samples=samples)
        b = onnx.load(report.path)
        assert [f.SerializeToString() for f in a.functions] == [f.SerializeToString() for f in b.functions]
        assert report.stateful
        assert figures(report).products == products > 0
        session = Session(report.path)
        stepped, state = [], None
        for at in range(ids.shape[1]):
            found, state = session.run({"input_ids": ids[:, at : at + 1]}, state)
            stepped.append(found["logits"])
        whole = session.run({"input_ids": ids})[0]["logits"]
        assert relative_error(np.concatenate(stepped, 1), whole) < (0.1 if form == "int8" else 1e-4)


def test_convolutions_are_quantised_where_they_are_calibrated(tmp_path: Path) -> None:
    guide = captured.convnet()
    samples = samples_of(None, guide.signature)
    made = {
        form: figures(
            export(guide.graph_module, guide.signature, tmp_path / f"{form}.onnx", quantize=form, samples=samples)
        )
        for form in FORMS
    }
    assert made["int8-static"].products > made["int8"].products == made["int4"].products == 1
    assert made["int8"].agreement is None
    assert made["int8"].unit == "of the variance"
    assert made["int8"].step_ms is None


class Convolution(nn.Module):
    """No matrix at all."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).relu()


def test_a_network_without_a_product_of_weights_is_told_what_else_there_is(tmp_path: Path) -> None:
    guide = capture(models.seeded(Convolution), {"x": models.vectors(2, 3, 8)})
    samples = samples_of(None, guide.signature)
    with pytest.raises(ExportError, match=r"quantize='int8': .*convolutions are quantised by quantize='int8-static'"):
        export(guide.graph_module, guide.signature, tmp_path / "m.onnx", quantize="int8", samples=samples)
    assert leftovers(tmp_path) == []
    report = export(guide.graph_module, guide.signature, tmp_path / "m.onnx", quantize="int8-static", samples=samples)
    assert figures(report).products == 1


def test_weights_that_do_not_bear_so_few_bits_leave_an_earlier_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError, match=r"an error of at most 1e-02 .*found \d.*don't bear so few bits"):
        gpt2(path, "int4", layers=1, tolerance=0.01)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.onnx"]


def test_a_tool_that_fails_leaves_an_earlier_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thesean.deploy.quantizing import tools

    def failing(*_: Any) -> None:
        raise ValueError("no such type\nand a long tail")

    monkeypatch.setitem(tools._TOOLS, "int8", failing)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"earlier")
    guide = captured.mlp()
    samples = samples_of(None, guide.signature)
    with pytest.raises(ExportError, match=r"quantize='int8': onnxruntime's tool fails: ValueError: no such type$"):
        export(guide.graph_module, guide.signature, path, quantize="int8", samples=samples)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.onnx"]


def test_weights_beside_the_file_are_the_quantised_ones(tmp_path: Path) -> None:
    report = gpt2(tmp_path / "m.onnx", "int8", layers=1, external_data=True)
    assert report.weights is not None
    assert leftovers(tmp_path) == ["m.onnx", report.weights.name]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir()) < figures(report).exact_bytes
    Session(report.path).run({"input_ids": models.tokens().numpy()})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"quantize": "int2"}, "quantize: expected one of int8, int8-static, int4, found 'int2'"),
        ({"quantize": 8}, "quantize: expected one of int8, int8-static, int4, found 8"),
        ({"quantize": "int8", "dtype": "float16"}, "starts from float32: leave dtype=float16 out"),
    ],
)
def test_a_form_that_there_is_not_is_refused_before_anything_is_exported(
    asked: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thesean.deploy.export.to_onnx", None)
    with pytest.raises(ExportError, match=told):
        thesean.export_guide(models.gpt2(), tmp_path / "m.onnx", data=models.token_batches(), **asked)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (iter(models.token_batches()), "data is an iterator"),
        ([], "data is empty"),
        ([{"ids": models.tokens()}], "batch 0: no input 'input_ids'"),
        ([{"input_ids": models.tokens(batch=1)}], "data holds one row"),
        ([{"input_ids": models.tokens().float()}] * 2, "batch 0: input_ids: expected torch.int64"),
    ],
)
def test_batches_that_do_not_fit_are_a_data_error(data: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        samples_of(data, captured.gpt2().signature)


def test_what_is_held_out_is_not_calibrated_on() -> None:
    signature = captured.gpt2().signature
    batches = models.token_batches(8)
    found = samples_of(batches, signature)
    assert [id(b["input_ids"]) for b in found.calibration] == [id(b["input_ids"]) for b in batches[:6]]
    assert [id(b["input_ids"]) for b in found.held_out] == [id(b["input_ids"]) for b in batches[6:]]
    single = samples_of(batches[:1], signature)
    rows = [b["input_ids"] for b in (*single.calibration, *single.held_out)]
    assert [len(r) for r in rows] == [3, 1]
    assert torch.equal(torch.cat(rows), batches[0]["input_ids"])


def test_a_conversion_and_a_guide_are_quantised_by_their_own_call(tmp_path: Path) -> None:
    guide = captured.gpt2()
    batches = models.token_batches(8)
    report = thesean.export_guide(models.gpt2(1), tmp_path / "guide.onnx", data=batches, quantize="int4")
    assert figures(report).samples == "the last 2 batches of data"
    assert figures(report).products == 5  # of an attention two, of an MLP two, and the head
    converted = thesean.compile(models.gpt2(1), "gru", data=batches, recipe="fast", progress=False)
    assert isinstance(converted, Converted)
    report = converted.export(tmp_path / "m.onnx", quantize="int8")
    assert "made of the example" in figures(report).samples
    assert "thesean.plan" in metadata(report.path)
    assert guide.signature.inputs[0].name in report.inputs


def test_what_is_the_guides_in_a_batch_is_as_the_caller_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    guide = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    data = [{"row": models.vectors(4, 8, seed=k), "number": k} for k in range(3)]
    asked: Any = {"data": data, "inputs": lambda batch: (batch["row"],), "quantize": "int8"}
    assert figures(thesean.export_guide(guide, tmp_path / "guide.onnx", **asked)).samples == "the last batch of data"
    converted = thesean.compile(guide, "linear", data=data, inputs=asked["inputs"], recipe="fast", progress=False)
    assert figures(converted.export(tmp_path / "m.onnx", **asked)).samples == "the last batch of data"
    found = thesean.trade_offs(
        {"mine": converted}, data=data, inputs=asked["inputs"], quantize=("int8",), batches=(1,), repeats=1
    )
    assert not found.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_of_another_precision_are_cast_as_the_network_is(tmp_path: Path, dtype: torch.dtype) -> None:
    """A file is of float32, whatever the guide is in; so were pixels of half precision refused."""
    torch.manual_seed(0)
    guide = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)
    data = [models.vectors(16, 8, seed=k).to(dtype) for k in range(3)]
    path = tmp_path / "guide.onnx"
    made = figures(thesean.export_guide(guide, path, example_inputs=data[0], data=data, quantize="int8-static"))
    assert made.calibrated == 2
