"""Folders for onnxruntime-genai: names, shapes and numbers; and the runtime itself, where it is installed.

B batch, T time, S steps so far
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import thesean
from tests import captured, exported, models
from tests.causal_guides import family
from tests.deploy.test_export import full_disk, leftovers
from thesean.deploy.export import export
from thesean.deploy.genai import folder as genai_folder
from thesean.deploy.genai.folder import Served
from thesean.deploy.genai.states import Caches, rename_states
from thesean.errors import ExportError, MissingExtraError, WriteError
from thesean.passes.capture.capture import capture

MIXED: dict[str, str | thesean.Target] = {"*.0": thesean.Target("linear-attention", window=4), "*.1": "keep"}
PAD = 31
installed = importlib.util.find_spec("onnxruntime_genai") is not None


def renamed(guide: Any, target: Any, folder: Path, mask: str | None) -> tuple[Any, ort.InferenceSession, Caches]:
    module = exported.hybrid(guide, target)
    report = export(module, guide.signature, folder / "m.onnx", stateful=True)
    model = ir.load(report.path)
    caches = rename_states(model, "input_ids", mask, PAD)
    ir.save(model, folder / "genai.onnx")
    return module, ort.InferenceSession(folder / "genai.onnx", providers=["CPUExecutionProvider"]), caches


@pytest.mark.parametrize(
    ("make", "target", "mask", "wanted"),
    [
        (
            lambda: family("gpt2", masked=True),
            {"*.0": "gru", "*.1": "keep"},
            "attention_mask",
            {"0.key": [2, 8], "0.value": [2, 8], "0.conv_state": [2], "0.recurrent_state": [16]},
        ),
        (  # chunks that are longer than its window of 5, and shorter ones
            lambda: family("mistral", masked=True),
            {"*.0": "gru", "*.1": "keep"},
            "attention_mask",
            {"0.key": [2, 8], "0.value": [2, 8], "0.conv_state": [2], "0.recurrent_state": [32]},
        ),
        pytest.param(
            captured.llama,
            MIXED,
            None,
            {"0.key": [2, 8], "0.value": [2, 8], "0.conv_state": [1], "0.recurrent_state": [2 * 16 * 9 + 2 * 8 * 17]},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_file_with_genai_s_names_gives_the_whole_s_numbers_in_chunks(make, target, mask, wanted, tmp_path):
    module, session, caches = renamed(make(), target, tmp_path, mask)
    assert caches == Caches(layers=1, heads=2, width=8)
    states = {i.name: i for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    assert {
        n.removeprefix("past_key_values."): [d for d in i.shape if isinstance(d, int)] for n, i in states.items()
    } == wanted
    ids_BT = models.tokens(3, 12) % PAD
    seen_BT = torch.ones_like(ids_BT)
    if mask is not None:  # the prompt of one row is shorter
        ids_BT[1, :2], seen_BT[1, :2] = PAD, 0
    state = {
        n: np.zeros(
            [d if isinstance(d, int) else 3 if d == "batch" else 0 for d in i.shape],
            np.int64 if i.type == "tensor(int64)" else np.float32,
        )
        for n, i in states.items()
    }
    names, found, start = [o.name for o in session.get_outputs()], [], 0
    for length in (6, 1, 4, 1):
        given = {"input_ids": ids_BT[:, start : start + length].numpy(), **state}
        if mask is not None:
            given[mask] = np.ones((3, start + length), np.int64)  # of all steps so far
        made = dict(zip(names, session.run(None, given), strict=True))
        found.append(made["logits"])
        state = {n: made[n.replace("past_key_values", "present")] for n in states}
        start += length
    with torch.no_grad():
        whole_BTV = module.eval()(input_ids=ids_BT, **({} if mask is None else {mask: seen_BT}))["logits"].numpy()
    shown_BT = seen_BT.bool().numpy()
    np.testing.assert_allclose(np.concatenate(found, 1)[shown_BT], whole_BTV[shown_BT], atol=1e-5, rtol=1e-4)


@pytest.mark.thorough
def test_a_latent_is_cut_in_a_key_and_a_value_and_stands_beside_no_other_cache(tmp_path):
    guide, ids_BT = captured.llama(layers=1), models.tokens(2, 8)
    module, session, caches = renamed(guide, "mla", tmp_path, None)
    assert (caches.layers, caches.heads) == (1, 1)
    past = {f"past_key_values.0.{part}": np.zeros((2, 1, 0, caches.width), np.float32) for part in ("key", "value")}
    found = []
    for chunk_BT in ids_BT.split((5, 1, 2), 1):
        logits_BTV, *after = session.run(None, {"input_ids": chunk_BT.numpy(), **past})
        found.append(logits_BTV)
        past = dict(zip(past, after, strict=True))
    with torch.no_grad():
        whole_BTV = module.eval()(input_ids=ids_BT)["logits"].numpy()
    np.testing.assert_allclose(np.concatenate(found, 1), whole_BTV, atol=1e-5, rtol=1e-4)
    with pytest.raises(ExportError, match=r"of one shape in all attentions that are kept, found heads: 1 of width"):
        renamed(captured.llama(), {"*.0": "mla", "*.1": "keep"}, tmp_path, None)


@pytest.mark.skipif(not installed, reason="onnxruntime-genai is not installed")
def test_onnxruntime_genai_loads_the_folder_and_writes_on(tmp_path):
    import onnxruntime_genai as genai

    converted = thesean.compile(models.llama(), MIXED, data=models.token_batches(), recipe="fast", progress=False)
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text("{}", encoding="utf-8")
    (words / "model.safetensors").write_text("large", encoding="utf-8")
    (words / "generation_config.json").write_text('{"eos_token_id": [31, 30]}', encoding="utf-8")
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    report = converted.export(folder, runtime="genai", tokenizer=words, external_data=True)
    assert (report.path, report.weights) == (folder, None)
    assert [c.label for c in report.checks][-2:] == ["onnxruntime-genai vs torch"] * 2
    assert max(c.max_abs_error for c in report.checks) < 1e-5
    assert "the guide was captured without a mask of tokens" in str(report)
    assert "past_key_values.0.recurrent_state" in report.inputs
    assert "present.0.key" in report.outputs
    there = {p.name for p in folder.iterdir()}
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "notes.txt"} <= there
    assert "model.safetensors" not in there
    assert len([n for n in there if n.endswith(".weights")]) == 1
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["eos_token_id"] == [31, 30]
    converted.export(folder, runtime="genai", tokenizer=words, external_data=True)  # once more, in its place
    assert {n for n in there if not n.endswith(".weights")} == {
        p.name for p in folder.iterdir() if p.suffix != ".weights"
    }
    assert len(list(folder.glob("*.weights"))) == 1

    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=12, do_sample=False)
    generator, ids = genai.Generator(model, params), models.tokens(1, 5)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    wanted = ids
    while wanted.shape[1] < 12 and wanted[0, -1] not in (30, 31):
        wanted = torch.cat([wanted, converted(wanted)["logits"][:, -1:].argmax(-1)], 1)
    assert generator.get_sequence(0).tolist()[: wanted.shape[1]] == wanted[0].tolist()


@pytest.mark.thorough
@pytest.mark.skipif(not installed, reason="onnxruntime-genai is not installed")
def test_a_guide_that_is_told_the_positions_is_told_those_of_a_padded_prompt(tmp_path):
    example = {"input_ids": models.tokens(3, 11)}
    example |= {"attention_mask": torch.ones_like(example["input_ids"])}
    example |= {"position_ids": torch.arange(11).expand(3, 11).contiguous()}
    guide = capture(models.gpt2(layers=1), example)
    report = export(guide.graph_module, guide.signature, tmp_path / "served", runtime="genai")
    assert "position_ids" in report.inputs
    assert "without a mask of tokens" not in str(report)
    in_genai = [c for c in report.checks if c.label == "onnxruntime-genai vs torch"]
    assert {c.shape[0] for c in in_genai} == {1, 2}
    assert max(c.max_abs_error for c in in_genai) < 1e-5


@pytest.fixture
def pretended(monkeypatch):
    """As if onnxruntime-genai were installed, for what is refused before it is asked."""
    monkeypatch.setattr(genai_folder, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (captured.resnet, "found input 'image' of shape"),
        (captured.bert, "no part carries a state"),
    ],
)
def test_what_genai_can_not_serve_is_refused_and_nothing_is_left(pretended, make, told, tmp_path):
    guide = make()
    with pytest.raises(ExportError, match=told):
        export(guide.graph_module, guide.signature, tmp_path / "served", runtime="genai")
    assert leftovers(tmp_path) == []


class Pooled(nn.Module):
    """ids_BT -> one row of numbers a text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(models.VOCABULARY, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids).mean(1)


def test_what_gives_no_logits_of_each_token_is_no_language_model():
    guide = capture(models.seeded(Pooled), models.tokens())
    with pytest.raises(ExportError, match=r"found output 'output' of shape \[2, 8\]"):
        Served.of(guide.graph_module, guide.signature)


def test_an_earlier_folder_stays_where_the_runtime_is_not_installed_or_disagrees(monkeypatch, tmp_path):
    guide, folder = captured.gpt2(layers=1), tmp_path / "served"
    folder.mkdir()
    (folder / "genai_config.json").write_text("earlier", encoding="utf-8")
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(genai_folder, "importlib", missing)
    with pytest.raises(MissingExtraError, match=r"onnxruntime-genai is not installed.*\[genai\]"):
        export(guide.graph_module, guide.signature, folder, runtime="genai")
    found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(genai_folder, "importlib", found)
    monkeypatch.setattr(genai_folder, "_run", lambda made, served, ids_BT: (ids_BT, 1 + served.run(ids_BT)))
    with pytest.raises(ExportError, match=r"onnxruntime-genai vs torch at \(1, 17\): expected an error of at most"):
        export(guide.graph_module, guide.signature, folder, runtime="genai")
    with pytest.raises(ExportError, match=rf"^{re.escape(str(folder))}: .* at most 1e-12 of the output"):
        export(guide.graph_module, guide.signature, folder, runtime="genai", tolerance=1e-12)
    with full_disk(), pytest.raises(WriteError, match=rf"^can't write {re.escape(str(folder))}: File too large"):
        export(guide.graph_module, guide.signature, folder, runtime="genai")
    assert (folder / "genai_config.json").read_text(encoding="utf-8") == "earlier"
    assert [p.name for p in folder.iterdir()] == ["genai_config.json"]
    assert leftovers(tmp_path) == ["served"]


def test_other_wrong_words_are_told_before_anything_is_made(pretended, tmp_path):
    guide = captured.gpt2(layers=1)
    for asked, told in [
        ({"runtime": "tensorrt"}, "runtime: expected one of onnxruntime, genai, portable, found 'tensorrt'"),
        ({"tokenizer": tmp_path}, "tokenizer: only a folder for runtime='genai' has one"),
        ({"runtime": "genai", "tokenizer": tmp_path}, "expected a folder with tokenizer files"),
        ({"runtime": "genai", "stateful": "no"}, "decodes step by step"),
    ]:
        with pytest.raises(ExportError, match=told):
            export(guide.graph_module, guide.signature, tmp_path / "served", **asked)
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file; runtime='genai' makes a folder"):
        export(guide.graph_module, guide.signature, tmp_path / "file", runtime="genai")
    assert leftovers(tmp_path) == ["file"]
