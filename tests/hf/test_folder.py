"""B batch, T time"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import thesean
from tests.guides import _masked, bert, gpt2, ids
from tests.hf.converted import bounded, counted, example, padded, tokenizer
from thesean import hf
from thesean.errors import ArtifactError, DataError, MissingExtraError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf.save_pretrained(bounded(), tmp_path / "model", tokenizer=tokenizer(), licence="apache-2.0")


def test_auto_classes_read_a_folder_and_compute_what_was_saved(folder: Path):
    loaded, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, hf.TheseanForCausalLM)
    assert not loaded.training
    inputs = example(seed=4)
    output, want = loaded(**inputs), bounded()(**inputs)
    assert torch.equal(output.logits, want.logits)
    assert words("w3 w1")["input_ids"] == [3, 1]
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.vocab_size, config.max_position_embeddings) == ("thesean", 32, 64)
    assert config.pad_token_id == loaded.generation_config.pad_token_id == words.pad_token_id


def test_shards_and_forms_that_are_asked_for_in_vain_are_told(folder: Path, tmp_path: Path):
    model = hf.from_pretrained(folder)
    with pytest.warns(UserWarning, match="is not followed: the weights are one") as told:
        model.save_pretrained(tmp_path / "small", max_shard_size="1KB", variant="fp16", safe_serialization=True)
    assert [str(w.message).split()[1] for w in told] == ["max_shard_size", "variant"]
    assert {p.name for p in (tmp_path / "small").glob("*model*")} == {"model.safetensors"}


def test_a_folder_holds_what_it_says(folder: Path):
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "graph.json", "plan.yaml",
        "report.json", "example.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    loaded = hf.from_pretrained(folder)
    assert load_file(folder / "model.safetensors").keys() == loaded.state_dict().keys()
    assert torch.equal(thesean.load(folder)(**example()).logits, bounded()(**example()).logits)


def test_the_card_tells_plan_figures_licence_and_how_to_load(folder: Path):
    card = (folder / "README.md").read_text()
    for told in (
        'license: "apache-2.0"', "Licence of the guide: apache-2.0", "LlamaForCausalLM (the guide)",
        "| model.layers.1 | bounded-attention(window=3, kept=2) |", "import thesean.hf", "AutoTokenizer",
        f"{bounded().report.converted['divergence']:.4f}",
    ):  # fmt: skip
        assert told in card, told
    hf.save_pretrained(bounded(), folder)
    assert "Licence of the guide: not stated" in (folder / "README.md").read_text()
    assert (folder / "tokenizer.json").exists()  # what isn't given anew stays
    (folder / "README.md").write_text("my own words")
    hf.save_pretrained(bounded(), folder)
    assert (folder / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_a_folder_is_read_in_the_precision_that_is_asked_for(folder: Path, dtype: Any, tmp_path: Path):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    assert half.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == half.dtype
    assert torch.equal(again(**example()).logits, half(**example()).logits)


@pytest.mark.slow
def test_an_encoder_gives_outputs_of_its_guides_class(tmp_path: Path):
    guide, batch = bert().eval(), _masked(3, 12, 0)
    converted = thesean.compile(guide, "narrow", recipe="fast", data=[batch], progress=False)
    hf.save_pretrained(converted, tmp_path / "encoder")
    loaded = AutoModel.from_pretrained(tmp_path / "encoder")
    output = loaded(**batch, token_type_ids=torch.zeros(3, 12, dtype=torch.long))
    assert type(output) is type(guide(**batch))
    assert torch.equal(output.last_hidden_state, converted(**batch).last_hidden_state)
    assert list(inspect.signature(loaded.forward).parameters) == ["input_ids", "attention_mask", "labels"]
    assert not (tmp_path / "encoder" / "generation_config.json").exists()
    with pytest.raises(DataError, match="no causal language model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "encoder")
    with pytest.raises(DataError, match="no output 'logits'"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder")


@pytest.mark.slow
def test_a_classifier_names_its_classes_and_gives_the_loss_of_labels(tmp_path: Path):
    from transformers import BertConfig, BertForSequenceClassification, pipeline

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=32, max_position_embeddings=64, id2label={0: "a", 1: "b", 2: "c"}, **sizes)
    torch.manual_seed(0)
    guide, batch = BertForSequenceClassification(config).eval(), _masked(3, 12, 0)
    converted = thesean.compile(guide, "narrow", recipe="fast", data=[batch], progress=False)
    hf.save_pretrained(converted, tmp_path / "classes", tokenizer=tokenizer(side="right"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classes")
    labels = torch.tensor([2, 0, 1])
    output = loaded(**batch, labels=labels)
    assert torch.equal(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert torch.equal(output.logits, converted(**batch).logits)
    classify = pipeline(
        "text-classification", model=loaded, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "classes")
    )
    assert classify("w1 w2 w3")[0]["label"] in {"a", "b", "c"}


def test_labels_are_asked_one_step_ahead_and_training_is_saved(tmp_path: Path):
    network, batch = hf.from_converted(bounded("model.layers.0")), padded(7, 9)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = network(**batch, labels=labels)
    want = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.equal(output.loss, want)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = network(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    network.eval().save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(again(**batch).logits, network(**batch).logits)
    written = [m.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (again, network)]
    assert torch.equal(*written)
    assert "trained further" in (tmp_path / "trained" / "README.md").read_text()
    # the conversion that it was made of is as it was
    assert torch.equal(
        bounded("model.layers.0")(**batch).logits, hf.from_converted(bounded("model.layers.0"))(**batch).logits
    )


@pytest.mark.parametrize("network", [lambda: bounded("model.layers.0"), counted], ids=["rotary", "table"])
def test_what_a_graph_makes_anew_is_made_where_its_weights_are(network: Any):
    moved = hf.from_converted(network()).to("meta")
    ids_BT = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert moved(ids_BT).logits.device.type == "meta"
    assert moved(ids_BT, use_cache=False).logits.shape == (2, 5, 32)


def test_weights_of_a_state_dict_are_saved_in_place_of_its_own(tmp_path: Path):
    network = hf.from_converted(counted())
    state = {name: value + 1 if value.is_floating_point() else value for name, value in network.state_dict().items()}
    network.save_pretrained(tmp_path / "other", state_dict=state)
    found = hf.from_pretrained(tmp_path / "other").state_dict()
    assert all(torch.equal(found[name], state[name]) for name in found)
    with pytest.raises(DataError, match="these are not this network's weights"):
        network.save_pretrained(tmp_path / "none", state_dict={"network.x": torch.ones(1)})


def test_a_push_uploads_the_folder_with_our_card_and_nobodys_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: list[str] = []

    class Hub:
        def __init__(self, token: Any = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **more: Any) -> Any:
            return type("Made", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, ignore_patterns: list[str], **more: Any) -> None:
            shutil.copytree(folder_path, tmp_path / "hub", ignore=shutil.ignore_patterns(*ignore_patterns))
            sent.append(repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    half = hf.from_converted(counted()).to(torch.bfloat16)
    half.push_to_hub("me/small", private=True)
    assert sent == ["me/small"]
    assert "GPT2LMHeadModel (the guide)" in (tmp_path / "hub" / "README.md").read_text()
    assert not (tmp_path / "hub" / "example.safetensors").exists()  # rows of the caller's data
    ids_BT = ids(2, 5, 1)
    assert torch.equal(hf.from_pretrained(tmp_path / "hub")(ids_BT).logits, half(ids_BT).logits)


def _truncate(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, folder / "model.safetensors")


def _config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def _settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[1]")


def _no_config(folder: Path) -> None:
    (folder / "config.json").write_text("[")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_truncate, "does not match its checksum"),
        (_config(roles={"tokens": "something", "logits": "logits"}), "roles: expected names of inputs"),
        (_config(roles={"tokens": [1], "logits": {}}), "roles: expected names of inputs"),
        (_config(roles=[1, 2]), "config.json"),
        (_config(vocab_size="many"), "config.json"),
        (_settings, "generation_config.json can't be read"),
        (_no_config, "config.json is missing or no JSON"),
    ],
)
def test_a_folder_that_was_altered_is_refused(folder: Path, change: Any, told: str):
    change(folder)
    with pytest.raises(ArtifactError, match=told):
        hf.from_pretrained(folder)


def test_folders_of_others_are_refused_and_left_alone(tmp_path: Path):
    gpt2().save_pretrained(tmp_path / "gpt2")
    before = (tmp_path / "gpt2" / "config.json").read_bytes()
    with pytest.raises(ArtifactError, match="a model of type 'gpt2', which isn't a conversion"):
        hf.from_pretrained(tmp_path / "gpt2")
    with pytest.raises(ArtifactError, match="holds a model of type 'gpt2'; choose another folder"):
        hf.save_pretrained(counted(), tmp_path / "gpt2")
    assert (tmp_path / "gpt2" / "config.json").read_bytes() == before
    counted().save(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"Load it with thesean\.load"):
        hf.from_pretrained(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="is no folder"):
        hf.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(dtype="int8"), "dtype: expected torch.float32"),
        (dict(device_map={"a": 0, "b": "cpu"}), "device_map: expected one device"),
        (dict(quantization_config={"bits": 4}), "a converted network has no 'quantization_config'"),
        (dict(attn_implementation="flash_attention_2"), "a graph has its own attentions"),
    ],
)
def test_settings_that_a_conversion_does_not_have_are_refused(settings: dict[str, Any], told: str, folder: Path):
    with pytest.raises(DataError, match=told):
        hf.from_pretrained(folder, **settings)


def test_what_is_no_conversion_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"expected what thesean\.compile or .* gives, found GPT2"):
        hf.save_pretrained(gpt2(), tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="can't be made of a configuration alone"):
        AutoModelForCausalLM.from_config(hf.from_converted(counted()).config)
    with pytest.raises(DataError, match=r"input_ids: expected whole numbers of shape \(batch, time\)"):
        hf.from_converted(counted())(ids(1, 3, 0)[0])


def test_the_module_is_there_when_it_is_asked_for():
    assert thesean.hf is hf
    with pytest.raises(AttributeError, match="module 'thesean' has no attribute 'hfs'"):
        thesean.hfs  # noqa: B018


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch):
    from thesean.hf import installed

    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"transformers is not installed.*\[hf\]"):
        installed.require_transformers()
