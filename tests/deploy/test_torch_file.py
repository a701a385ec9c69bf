"""A .pt2 file is torch's alone: it loads where Thesean can't be imported, and computes the same there.

B batch, T time
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import captured, exported, models
from tests.causal_guides import family
from tests.deploy.test_export import full_disk, leftovers
from thesean.deploy.export import export
from thesean.deploy.lowering.forms import torch_cell
from thesean.deploy.lowering.lower import cells_in_torch
from thesean.errors import ExportError, WriteError
from thesean.passes.capture.captured import Captured

ALONE = """
import sys
sys.modules["thesean"] = None  # an import of it fails
import traceback
import torch
for line in sys.stdin:
    file, inputs, out = line.rstrip("\\n").split("\\t")
    try:
        program = torch.export.load(file)
        module, given, outputs, start = program.module(), torch.load(inputs), [], 0
        rows = len(next(iter(given.values())))
        # what starts a sequence, as the file itself tells its states: no step is remembered
        values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
        state = {}
        for name, value in values.items():
            if name.startswith("state_in_"):
                sizes = [d if isinstance(d, int) else 0 if k else rows for k, d in enumerate(value.shape)]
                state[name] = torch.zeros(sizes, dtype=value.dtype)
        for length in (1, 3, 1, 40, 15):  # 4 steps: all that a window of 5 remembers
            chunk = {name: value[:, start : start + length] for name, value in given.items()}
            found = module(**chunk, **state)
            outputs.append(found[0])
            state, start = dict(zip(state, found[1:])), start + length
        torch.save({"outputs": torch.cat(outputs, 1), "states": list(state)}, out)
        print("written", flush=True)
    except Exception:
        print(repr(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A process in which Thesean can't be imported, one for all files: it takes three places and says "written"."""
    with subprocess.Popen(
        [sys.executable, "-c", ALONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path_factory.mktemp("alone"),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(*places: Path) -> str:
            process.stdin.write("\t".join(map(str, places)) + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield run
        process.stdin.close()


llama, gpt2 = partial(captured.llama, layers=1), partial(captured.gpt2, layers=1)

# what stands in the guide -> (guide, target); None: the guide's own, its attentions with a cache. Without a table of
# positions, as a llama is, a chunk may be longer than any block of a kernel.
FAMILIES: dict[str, tuple[Callable[[], Captured], Any]] = {
    "kept": (gpt2, None),
    "kept with a window": (lambda: family("mistral"), None),
    "linear": (llama, thesean.Target("linear-attention", window=0)),
    "window": (llama, thesean.Target("linear-attention", window=4, sinks=2)),
    "held": (llama, "bounded-attention"),
    "delta": (llama, "delta"),
    "ssm": (llama, "ssm"),
    "mingru": (llama, "mingru"),
    "reservoir": (llama, "reservoir"),
    "conv": (llama, "conv"),
    "parallel-block": (gpt2, "parallel-block"),
    "elman": (llama, "elman"),
    "gru": (gpt2, "gru"),
    "lstm, told of padding": (lambda: family("gpt2", masked=True), "lstm"),
}
FEW = ("kept", "window", "gru", "ssm")  # while one works


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.thorough) for n in FAMILIES])
def test_every_family_streams_in_chunks_of_any_length_where_thesean_can_not_be_imported(
    name: str, tmp_path: Path, alone: Callable[..., str]
) -> None:
    make, target = FAMILIES[name]
    guide = make()
    module = guide.graph_module if target is None else exported.hybrid(guide, target)
    report = export(module, guide.signature, tmp_path / "m.pt2", train_length=30)
    assert report.stateful
    assert {c.label for c in report.checks} == {"the file vs torch", "chunks in the file vs whole"}
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert "a graph of torch's, with state" in str(report)
    ids = models.tokens(3, 60)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = {n: inputs[n] for n in (spec.name for spec in guide.signature.inputs)}
    places = [tmp_path / n for n in ("m.pt2", "inputs.pt", "found.pt")]
    torch.save(inputs, places[1])
    assert alone(*places) == "written"
    found = torch.load(places[2])
    assert found["states"] == [n for n in report.inputs if n.startswith("state_in_")]
    with torch.no_grad():
        expected = module.eval()(**inputs)["logits"]
    torch.testing.assert_close(found["outputs"], expected, atol=1e-5, rtol=1e-4)


def test_what_a_file_holds_does_not_change_the_module(tmp_path: Path) -> None:
    guide = captured.gpt2()
    module = exported.hybrid(guide, "gru")
    before = models.state_of(module)
    export(module, guide.signature, tmp_path / "m.pt2")
    assert models.same_state(module, before)
    assert any(isinstance(m, torch.nn.GRU) for m in module.modules())


class Cells(torch.nn.Module):
    """Torch's own cells: layers, directions, a projection, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(models.VOCABULARY, 8)
        self.both = torch.nn.LSTM(8, 12, 2, bidirectional=True, batch_first=True, proj_size=5)
        self.up = torch.nn.GRU(10, 12, 2, batch_first=True)
        self.last = torch.nn.RNN(12, 8, nonlinearity="relu", batch_first=True, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.both(self.words(ids))[0])[0])[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_cells_of_any_kind_are_written_for_every_size() -> None:
    module, D = models.seeded(Cells).eval(), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(cells_in_torch(module), (models.tokens(5, 11),), dynamic_shapes=({0: D, 1: D},))
        for batch, time in ((1, 1), (2, 7), (3, 40)):
            ids = models.tokens(batch, time)
            torch.testing.assert_close(program.module()(ids), module(ids), atol=1e-6, rtol=1e-5)


def test_what_carries_no_state_is_written_too_and_takes_any_batch(tmp_path: Path) -> None:
    report = thesean.export_guide(models.resnet(), tmp_path / "m.pt2", example_inputs=(models.vectors(3, 1, 8, 8),))
    assert not report.stateful
    assert [c.shape for c in report.checks] == [(1,), (2,), (5,)]


class Texts(torch.nn.Module):
    """Of a text of three words a convolution leaves one place."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = torch.nn.Embedding(models.VOCABULARY, 6), torch.nn.Linear(16, 3)
        self.near = torch.nn.ModuleList(torch.nn.Conv1d(6, 8, width) for width in (2, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        words = self.words(ids).transpose(1, 2)
        return self.last(torch.cat([near(words).relu().amax(-1) for near in self.near], 1))


def test_a_length_that_leaves_one_place_runs_too(tmp_path: Path) -> None:
    guide = models.seeded(Texts)
    thesean.export_guide(guide, tmp_path / "m.pt2", example_inputs=models.tokens(4, 9))
    file = torch.export.load(str(tmp_path / "m.pt2")).module()
    for batch, time in ((1, 3), (2, 4), (5, 30)):
        ids = models.tokens(batch, time)
        torch.testing.assert_close(file(ids=ids)[0], guide(ids))


def test_what_torch_can_not_write_for_every_size_is_refused_and_leaves_an_earlier_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide, path = captured.gpt2(), tmp_path / "m.pt2"
    monkeypatch.delattr(torch_cell, "in_torch")  # torch takes its steps one by one
    path.write_bytes(b"earlier")
    with pytest.raises(ExportError, match=r"torch can't write this graph for every size: .*Write an \.onnx file"):
        export(exported.hybrid(guide, "gru"), guide.signature, path)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.pt2"]


@pytest.mark.parametrize("asked", [{"opset": 21}, {"dtype": "float16"}, {"external_data": True}, {"check": "skip"}])
def test_what_is_said_of_onnx_alone_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    guide = captured.mlp()
    with pytest.raises(ExportError, match=f"{next(iter(asked))} is for ONNX files alone"):
        export(guide.graph_module, guide.signature, tmp_path / "m.pt2", **asked)
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    guide, path = captured.mlp(), tmp_path / "m.pt2"
    path.write_bytes(b"earlier")
    with full_disk(), pytest.raises(WriteError, match=r"can't write .*m\.pt2: File too large\. Free some space"):
        export(guide.graph_module, guide.signature, path)
    assert path.read_bytes() == b"earlier"
    assert leftovers(tmp_path) == ["m.pt2"]
