"""An encoder-decoder as two files: they are the network, its decoder in chunks, and take their names together.

B batch, T steps of the target, S steps of the source, V vocabulary
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import thesean
from tests import encoder_decoders, models
from tests.deploy.quantizing.test_quantized import OPERATORS
from tests.deploy.test_onnx_file import LARGE
from tests.deploy.test_onnx_file import model as adding
from tests.encoder_decoders import GUIDES, guide
from tests.models import tokens
from thesean.cli.app import app
from thesean.deploy.encoder_decoder import _publish, encoder_beside, export_network
from thesean.deploy.export_report import ExportReport
from thesean.deploy.onnx_file import draft, metadata
from thesean.deploy.quantizing.quantized import QUANTIZED, QUANTIZED_PARITY
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays
from thesean.distill.outputs import Outputs
from thesean.errors import DataError, ExportError, WriteError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.nodes import leaf_values
from thesean.samples import samples_of


@dataclass(frozen=True)
class Files:
    guide: Captured
    report: ExportReport
    source: tuple[str, ...]

    @cached_property
    def session(self) -> Session:
        return Session(self.report.path)

    @torch.no_grad()
    def whole(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        given = {s.name: inputs[s.name] for s in self.guide.signature.inputs}
        return leaf_values(self.guide.graph_module(**given))[0].numpy()

    def encode(self, inputs: dict[str, torch.Tensor]) -> Arrays:
        return self.session.encode({name: inputs[name].numpy() for name in self.source})

    def chunks(self, inputs: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> np.ndarray:
        encoded, state, parts = self.encode(inputs), None, []
        tokens_name = self.session.inputs[0]
        for piece in inputs[tokens_name].split(sizes, 1):
            found, state = self.session.run({**encoded, tokens_name: piece.numpy()}, state)
            parts.append(found[self.session.outputs[0]])
        return np.concatenate(parts, 1)


def files(name: str, folder: Path) -> Files:
    found = guide(name)
    report = export_network(found.graph_module, found.signature, folder / f"{name}.onnx", train_length=9)
    source = tuple(s.name for s in found.signature.inputs if s.name not in ("decoder_input_ids", "target"))
    return Files(found, report, source)


class Made(dict[str, Files]):
    """Each pair is written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Files:
        self[name] = files(name, self.folder)
        return self[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(params=["t5", "bart"])
def pair(request, made) -> Files:
    return made[request.param]


def test_the_report_lists_both_files_and_what_was_compared(pair):
    report, beside = pair.report, pair.report.encoder
    assert beside.path == report.path.with_name(f"{report.path.stem}.encoder.onnx")
    assert report.path.is_file()
    assert beside.path.is_file()
    assert (report.stateful, beside.stateful) == (True, False)
    assert report.note == ""
    labels = {c.label for c in report.checks}
    assert {"both files vs torch", "both files in chunks vs torch", "chunks in onnxruntime vs whole"} <= labels
    assert max(c.max_abs_error for c in (*report.checks, *beside.checks)) < 1e-4
    assert f"its encoder: wrote {beside.path}" in str(report)


@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_and_steps_beside_a_source_equal_the_whole_in_torch(pair, batch):
    inputs = GUIDES[pair.report.path.stem][1](batch, 6, 13, seed=4)
    want = pair.whole(inputs)
    for sizes in ((13,), (1,) * 13, (1, 5, 7), (6, 1, 1, 5)):
        np.testing.assert_allclose(pair.chunks(inputs, sizes), want, rtol=1e-4, atol=1e-4)


def test_padded_sources_are_what_they_are_alone(made):
    check_padding(made["bart"])


@pytest.mark.thorough
def test_layers_of_torchs_own_and_a_mask_of_booleans(tmp_path):
    pair = files("translator", tmp_path)
    assert pair.report.note == ""
    check_padding(pair)


def check_padding(pair: Files) -> None:
    inputs = GUIDES[pair.report.path.stem][1](3, 8, 6, seed=6)
    mask = next(n for n in inputs if n in ("attention_mask", "hidden"))
    inputs[mask][1, 5:] = mask == "hidden"
    got = pair.chunks(inputs, (2, 4))
    np.testing.assert_allclose(got, pair.whole(inputs), rtol=1e-4, atol=1e-4)
    alone = {n: v[1:2] if n in ("target", "decoder_input_ids") else v[1:2, :5] for n, v in inputs.items()}
    np.testing.assert_allclose(got[1:2], pair.chunks(alone, (6,)), rtol=1e-4, atol=1e-4)


def test_rows_are_independent_and_one_starts_anew_while_the_others_go_on(pair):
    session, inputs = pair.session, GUIDES[pair.report.path.stem][1](3, 7, 9, seed=8)
    assert session.has_rows
    name, encoded = session.inputs[0], pair.encode(inputs)
    ids_BT = inputs[name].numpy()
    _, state = session.run({**encoded, name: ids_BT[:, :4]})
    for value in state.values():
        value[1] = 0
    found, _ = session.run({**encoded, name: ids_BT[:, 4:]}, state)
    got, whole = found[session.outputs[0]], pair.whole(inputs)[:, 4:]
    anew = pair.whole({**inputs, name: inputs[name][:, 4:]})
    for row, want in ((0, whole[0]), (1, anew[1]), (2, whole[2])):
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)
    one = pair.chunks({n: v[2:] for n, v in inputs.items()}, (4, 5))
    np.testing.assert_allclose(pair.chunks(inputs, (4, 5))[2:], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "start"), [("t5", 0), ("bart", 2)])
def test_greedy_text_is_what_transformers_writes(made, name, start):
    pair, (build, make) = made[name], GUIDES[name]
    inputs = {n: v for n, v in make(3, 7, 1, seed=9).items() if n != "decoder_input_ids"}
    model: nn.Module = build()
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)[:, 1:]
    encoded = pair.encode(inputs)
    assert pair.session.generate([[start]] * 3, 12, encoded=encoded) == wanted.tolist()
    row = {n: v[1:2] for n, v in encoded.items()}
    assert pair.session.generate([start], 12, encoded=row) == wanted[1].tolist()


def test_streams_of_sources_of_any_length_share_a_server(made):
    pair = made["t5"]
    rows: dict[int, list[int]] = {}
    streams = pair.session.streams()
    wanted = {}
    for seed, length in ((1, 4), (2, 7), (3, 4)):
        encoded = pair.session.encode({"input_ids": tokens(1, length, seed).numpy()})
        wanted[streams.join([0], encoded=encoded)] = pair.session.generate([0], 5, encoded=encoded)
    for _ in range(5):
        for stream, token in streams.step().items():
            rows.setdefault(stream, []).append(token)
    assert rows == wanted
    assert len({tuple(row) for row in rows.values()}) == 3


def test_outputs_of_the_encoder_alone_are_its_files(made):
    pair = made["t5"]
    assert pair.session.outputs == ("logits",)
    inputs = encoder_decoders.t5_inputs(2, 6, 3)
    found, _ = pair.session.encoder.run({"input_ids": inputs["input_ids"].numpy()})
    with torch.no_grad():
        want = encoder_decoders.t5()(**inputs).encoder_last_hidden_state.numpy()
    np.testing.assert_allclose(found["encoder_last_hidden_state"], want, rtol=1e-4, atol=1e-4)


def test_a_spectrogram_of_one_size_is_told_from_a_text_of_any_length(tmp_path):
    data = [encoder_decoders.whisper_inputs(2, 24, 9, seed) for seed in range(2)]
    model = thesean.compile(encoder_decoders.whisper(), "rnn", data=data, recipe="fast", progress=False)
    report = model.export(tmp_path / "m.onnx", stateful="yes")
    session, inputs = Session(report.path), encoder_decoders.whisper_inputs(3, 24, 12, seed=20)
    assert session.has_rows
    encoded = session.encode({"input_features": inputs["input_features"].numpy()})
    state, parts = None, []
    for piece in inputs["decoder_input_ids"].split((1, 5, 6), 1):
        found, state = session.run({**encoded, "decoder_input_ids": piece.numpy()}, state)
        parts.append(found["logits"])
    with torch.no_grad():
        want = model(**inputs).logits.numpy()
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=1e-4, atol=1e-4)


# forms


@pytest.mark.parametrize("form", ["int4", pytest.param("int8-static", marks=pytest.mark.thorough)])
def test_both_files_hold_whole_numbers_each_held_against_its_exact_one(made, tmp_path, form):
    exact, found, data = made["bart"], guide("bart"), [encoder_decoders.masked(3, 9, 7, seed) for seed in range(5)]
    for batch in data:
        batch["attention_mask"][1, 5:] = 0  # a mask that crosses, and is nothing to be judged by
    samples = samples_of(data, found.signature)
    report = export_network(found.graph_module, found.signature, tmp_path / "m.onnx", quantize=form, samples=samples)
    assert report.stateful
    assert report.tolerance == QUANTIZED_PARITY[form]
    assert {"both files vs torch", "both files in chunks vs torch"} <= {c.label for c in report.checks}
    for half, own in ((report, exact.report), (report.encoder, exact.report.encoder)):
        assert half.quantized.exact_bytes == pytest.approx(own.bytes, rel=0.05)
        kinds = [n.op_type for n in onnx.load(half.path).graph.node]
        assert kinds.count(OPERATORS[form]) >= half.quantized.products >= 5
        assert half.quantized.calibrated == 4
        assert QUANTIZED in metadata(half.path)
    assert (report.quantized.unit, report.encoder.quantized.unit) == ("nats", "of the variance")
    assert report.quantized.agreement is not None
    assert report.encoder.quantized.agreement is None
    last = {n: v.numpy() for n, v in data[-1].items()}
    source = {n: last[n] for n in exact.source}
    session, encoded = Session(report.path), exact.session.encode(source)
    pairs = [s.encoder.run(source)[0] for s in (session, exact.session)]
    own, wanted = ({n: torch.from_numpy(v) for n, v in outputs.items()} for outputs in pairs)
    same = [n for n, v in own.items() if torch.equal(v, wanted[n])]
    assert len(same) == 1  # the mask
    judge = Outputs(kinds=dict.fromkeys(own.keys() - same, "mse"), told="")
    assert report.encoder.quantized.divergence == pytest.approx(float(judge.distance(own, wanted)), rel=1e-3)
    given = {"decoder_input_ids": last["decoder_input_ids"], **encoded}
    p, q = (torch.from_numpy(s.run(given)[0]["logits"]).log_softmax(-1) for s in (exact.session, session))
    assert report.quantized.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_both_files_are_in_half_precision_where_its_name_is_asked_for(tmp_path):
    found = guide("plain")
    report = export_network(found.graph_module, found.signature, tmp_path / "m.onnx", dtype="float16")
    assert (report.dtype, report.encoder.dtype) == ("float16", "float16")
    assert report.stateful
    assert 1e-6 < max(c.max_abs_error for c in report.checks) < 3e-2


# latencies and trade-offs


def test_all_that_the_network_takes_is_run_by_both_files(made):
    pair = made["bart"]
    inputs = GUIDES["bart"][1](2, 7, 5, seed=3)
    outputs, state = pair.session.run_whole({n: v.numpy() for n, v in inputs.items()})
    np.testing.assert_allclose(outputs["logits"], pair.whole(inputs), rtol=1e-4, atol=1e-4)
    assert set(outputs) == set(pair.session.outputs) | set(pair.session.encoder.outputs) - {*pair.session.held}
    more = {n: v[:, -1:].numpy() if n == "decoder_input_ids" else v.numpy() for n, v in inputs.items()}
    step = pair.session.step_after({n: v.numpy() for n, v in inputs.items()}, more)
    assert set(step) == {"decoder_input_ids", *pair.session.held}
    pair.session.run(step, state)


def test_a_conversion_is_judged_and_timed_as_it_serves(tmp_path):
    build, make = GUIDES["t5"]
    data = [make(2, 6, 5, seed) for seed in range(3)]
    converted = thesean.compile(build(), "narrow", data=data, recipe="fast", progress=False)
    found = thesean.trade_offs(
        {"mine": converted}, data=data, quantize=(None, "int8"), lengths=(8,), batches=(1,), repeats=2
    )
    assert not found.notes
    both = converted.export(tmp_path / "m.onnx")
    assert [(p.name, p.token_kind) for p in found][2:] == [("mine", "state"), ("mine, int8", "state")]
    assert found[2].file_bytes == pytest.approx(both.bytes + both.encoder.bytes, rel=0.01)
    held = sum(v.nbytes for v in Session(both.path).encode({"input_ids": np.ones((1, 8), np.int64)}).values())
    for point in found:
        (served,) = point.served
        assert served.prefill.median_ms > served.token.median_ms > 0
        assert served.state_bytes > held
    assert list(converted.benchmark((8,), repeats=2)) == ["prefill_8", "token_8"]


# what files say of themselves


def test_both_files_tell_what_they_are(made):
    pair = made["bart"]
    told = json.loads(pair.session.metadata["thesean.encoder"])
    assert told["file"] == "bart.encoder.onnx"
    assert told["gives"] == list(pair.session.held) == [f"encoded_{k}" for k in range(3)]
    assert json.loads(pair.session.encoder.metadata["thesean.decoder"]) == {"file": "bart.onnx"}
    shown = CliRunner().invoke(app, ["inspect", str(pair.report.path)]).output
    assert "encoder\n  bart.encoder.onnx; it gives encoded_0, encoded_1" in shown
    assert "decoder\n  bart.onnx" in shown
    assert "the encoder's output of that name, the same in every call" in shown


# bad input


@pytest.fixture
def copied(made, tmp_path) -> Path:
    for path in (made["t5"].report.path, made["t5"].report.encoder.path):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / "t5.onnx"


SOURCE = {"input_ids": np.array([[3, 1, 4], [1, 5, 9]])}


def test_an_encoder_that_is_missing_or_of_another_conversion_is_told(made, copied):
    encoder = copied.with_name("t5.encoder.onnx")
    encoder.write_bytes(made["bart"].report.encoder.path.read_bytes())
    with pytest.raises(ExportError, match=r"t5\.encoder\.onnx is of another conversion\. Export both again\.$"):
        Session(copied).encode(SOURCE)
    encoder.unlink()
    with pytest.raises(ExportError, match=r"its encoder, t5\.encoder\.onnx, is not beside it\. Move both files"):
        Session(copied).encode(SOURCE)
    assert "t5.encoder.onnx, which is missing" in CliRunner().invoke(app, ["inspect", str(copied)]).output


def test_a_source_of_another_batch_is_told(made):
    session = made["t5"].session
    encoded = session.encode(SOURCE)
    with pytest.raises(
        DataError,
        match=r"encoded_0: expected a source of 3 rows, .* the shape \(2, 2, 3, 8\)",
    ):
        session.run({**encoded, "decoder_input_ids": np.zeros((3, 1), np.int64)})
    with pytest.raises(DataError, match=r"encoded: expected 3 rows, .* encoded_0 of the shape \(2, 2, 3, 8\)"):
        session.generate([[0]] * 3, 2, encoded=encoded)
    with pytest.raises(DataError, match=r"expected encoded=session\.encode\(\{\.\.\.\}\), its source, found none"):
        session.generate([0], 2)
    with pytest.raises(DataError, match="missing input 'encoded_0'"):
        session.run({"decoder_input_ids": np.zeros((2, 1), np.int64)})
    with pytest.raises(DataError, match=r"encoded: expected encoded_0, .* found no encoded_1"):
        session.generate([[0]] * 2, 2, encoded={n: v for n, v in encoded.items() if n != "encoded_1"})
    with pytest.raises(DataError, match=r"encoded: expected what encode\(\) gives, arrays by name, found a list"):
        session.generate([0], 2, encoded=[1])
    with pytest.raises(DataError, match="doesn't take 'decoder_input_ids', so that it would be ignored"):
        session.encode({**SOURCE, "decoder_input_ids": np.zeros((2, 1), np.int64)})


def test_a_file_without_an_encoder_says_so(made):
    encoder = made["t5"].session.encoder
    with pytest.raises(DataError, match="expected a decoder's file, found one that reads everything itself"):
        encoder.encode(SOURCE)


def test_neither_file_takes_its_name_where_the_other_cannot(made, copied, monkeypatch):
    before = {p.name: p.read_bytes() for p in copied.parent.iterdir()}
    found, replaced = guide("plain"), os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "t5.onnx":
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(WriteError, match=r"can't write .*t5\.onnx: No space left on device"):
        export_network(found.graph_module, found.signature, copied, stateful=True)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in copied.parent.iterdir()} == before


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refused)


def published(folder: Path, number: float, beside: bool = False, fails: bool = False) -> None:
    """A decoder and an encoder that add a number, under their names; `fails`: the decoder can't have its own."""
    with draft(folder / "m.onnx") as second, draft(encoder_beside(folder / "m.onnx")) as first:
        for each in (first, second):
            each.write(adding(number), beside)
        if fails:
            second.name.mkdir()
        _publish(first, second)


def added(path: Path) -> float:
    return float(Session(path).run({"x": np.zeros((1, LARGE), np.float32)})[0]["y"][0, 0])


@pytest.mark.parametrize("beside", [False, True])
def test_both_take_the_place_of_earlier_ones_and_leave_nothing_else(tmp_path, links, beside):
    for number in (1.0, 2.0):
        published(tmp_path, number, beside)
        assert [added(p) for p in (tmp_path / "m.onnx", tmp_path / "m.encoder.onnx")] == [number] * 2
        assert len(list(tmp_path.iterdir())) == (4 if beside else 2)


@pytest.mark.parametrize("beside", [False, True])
def test_where_the_second_can_not_the_first_is_what_it_was(tmp_path, links, beside):
    published(tmp_path, 1.0, beside)
    (tmp_path / "m.onnx").unlink()
    for weights in tmp_path.glob("m.onnx.*.weights"):
        weights.unlink()
    with pytest.raises(WriteError, match=r"can't write .*m\.onnx"):
        published(tmp_path, 2.0, beside, fails=True)
    assert added(tmp_path / "m.encoder.onnx") == 1.0
    assert len(list(tmp_path.iterdir())) == (3 if beside else 2)  # with the folder that is in the way
    (tmp_path / "m.onnx").rmdir()
    for left in tmp_path.iterdir():
        left.unlink()
    with pytest.raises(WriteError, match=r"can't write .*m\.onnx"):
        published(tmp_path, 2.0, beside, fails=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# what can't be two files


def test_a_decoder_that_carries_no_state_is_one_file_and_the_reason_told(tmp_path):
    found = capture(models.seeded(encoder_decoders.Plain, False, False), encoder_decoders.plain_inputs(2, 6, 5))
    report = export_network(found.graph_module, found.signature, tmp_path / "m.onnx")
    assert not report.stateful
    assert report.encoder is None
    assert report.note.startswith("without state: no part carries a state")
    with pytest.raises(ExportError, match="a stateful export is not possible: thread state: no part carries a state"):
        export_network(found.graph_module, found.signature, tmp_path / "no.onnx", stateful=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_decoder_whose_length_is_its_sources_is_told(tmp_path):
    found = capture(models.seeded(encoder_decoders.Plain, True), encoder_decoders.plain_inputs(2, 6, 6))
    with pytest.raises(ExportError, match="takes source only as long as target: expected a decoder whose"):
        export_network(found.graph_module, found.signature, tmp_path / "m.onnx", stateful=True)


def test_a_graph_of_torchs_is_one_file_and_says_where_two_are_to_be_had(tmp_path):
    found = guide("t5")
    report = export_network(found.graph_module, found.signature, tmp_path / "m.pt2")
    assert not report.stateful
    assert "a .pt2 file holds encoder and decoder in one: expected a name that ends in .onnx" in report.note
    with pytest.raises(ExportError, match=r"\.pt2 file holds encoder and decoder in one: .* stateful='no'\.$"):
        export_network(found.graph_module, found.signature, tmp_path / "no.pt2", stateful=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("stateful", ["auto", True])
def test_onnxruntime_genai_is_asked_for_in_vain(tmp_path, stateful):
    """It is told what that serves, not what stands in the way of two files."""
    found, path = guide("t5"), tmp_path / "served"
    with pytest.raises(
        ExportError, match=r"^genai: onnxruntime-genai serves causal language models alone: .*input_ids"
    ):
        export_network(found.graph_module, found.signature, path, stateful=stateful, runtime="genai")
    assert not any(tmp_path.iterdir())


# conversions


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["rnn", pytest.param("narrow", marks=pytest.mark.slow)])
def test_a_conversion_is_two_files(tmp_path, target):
    converted = thesean.compile(
        encoder_decoders.t5(1), target, data=[encoder_decoders.t5_inputs(3, 9, 7, seed) for seed in range(4)],
        recipe={"steps": 2}, progress=False,
    )  # fmt: skip
    report = converted.export(tmp_path / "m.onnx", stateful="yes")
    assert report.encoder is not None
    session, inputs = Session(report.path), encoder_decoders.t5_inputs(2, 5, 8, seed=20)
    encoded = session.encode({"input_ids": inputs["input_ids"].numpy()})
    state, parts = None, []
    for piece in inputs["decoder_input_ids"].split((1, 4, 3), 1):
        found, state = session.run({**encoded, "decoder_input_ids": piece.numpy()}, state)
        parts.append(found["logits"])
    with torch.no_grad():
        want = converted(**inputs).logits.numpy()
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=1e-4, atol=1e-4)
