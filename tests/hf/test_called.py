"""What a model of transformers' kind is called with, loaded by and written beside.

B batch, T time
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.guides import ids
from tests.hf.converted import bounded, counted, padded, tokenizer
from tests.models import VOCABULARY
from thesean import hf
from thesean.errors import ArtifactError, DataError, ExportError, TheseanError
from thesean.hf.labels import loss_of


@cache
def network() -> Any:
    return hf.from_converted(bounded("model.layers.0"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf.save_pretrained(bounded("model.layers.0"), tmp_path / "converted")


def test_whole_numbers_of_any_size_are_ids_masks_and_labels():
    given = padded(5, 7)
    small = {name: value.to(torch.int32) for name, value in given.items()}
    told, want = (network()(**one, labels=one["input_ids"]) for one in (small, given))
    assert torch.equal(told.logits, want.logits)
    assert torch.equal(told.loss, want.loss)
    assert torch.equal(network()(**small, use_cache=True).logits, network()(**given, use_cache=True).logits)


def test_without_return_dict_the_loss_comes_first_as_in_transformers():
    given = padded(5, 7)
    loss, logits = network()(**given, labels=given["input_ids"], return_dict=False)
    assert loss.ndim == 0
    assert logits.shape == (2, 7, VOCABULARY)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(input_ids=[[1, 2]]), "input_ids: expected a tensor of shape .batch, time., found list"),
        (dict(input_ids=torch.ones(2, 3)), "input_ids: expected whole numbers .* found torch.float32 of shape .2, 3."),
        (dict(input_ids=ids(2, 3, 0)[:, :0]), r"input_ids is empty, of shape \(2, 0\)"),
        (dict(attention_mask=[[1, 1, 1]]), r"attention_mask: expected a tensor of shape \(2, 3\), found list"),
        (dict(attention_mask=torch.ones(2, 4)), r"attention_mask: .* \(2, 3\), found shape \(2, 4\)"),
        (dict(attention_mask=torch.ones(2, 1, 3, 3)), r"found shape \(2, 1, 3, 3\)"),
        (dict(labels=[1, 2]), "labels: expected a tensor, found list"),
        (dict(labels=ids(2, 2, 0)), r"labels: expected tokens of shape \(2, 3\), .* of shape \(2, 2\)"),
        (dict(labels=torch.ones(2, 3)), "labels: expected tokens of .* found torch.float32"),
        (dict(labels=ids(2, 3, 0) + VOCABULARY), f"labels hold .* expected 0 to {VOCABULARY - 1}, or -100"),
        (dict(logits_to_keep="all"), "logits_to_keep: expected a whole number or places, found 'all'"),
    ],
)
def test_what_a_language_model_does_not_read_is_told(given: dict[str, Any], told: str, cached: bool):
    with pytest.raises(DataError, match=told):
        network()(**{"input_ids": ids(2, 3, 0), "use_cache": cached, **given})


def test_losses_are_those_of_transformers_classifiers():
    torch.manual_seed(0)
    logits, several = torch.randn(4, 3), torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    many = "multi_label_classification"
    assert torch.equal(
        loss_of(logits, several, None, many), functional.binary_cross_entropy_with_logits(logits, several)
    )
    assert torch.equal(loss_of(logits, several.long(), many), loss_of(logits, several, many))
    assert torch.equal(loss_of(logits, several, None), functional.mse_loss(logits, several))
    assert torch.equal(loss_of(logits, several, "regression", many), functional.mse_loss(logits, several))
    assert torch.equal(
        loss_of(logits[:, :1], several[:, 0], None, many), functional.mse_loss(logits[:, 0], several[:, 0])
    )
    classes = torch.tensor([2, -100, 0, 1], dtype=torch.int32)
    assert torch.equal(loss_of(logits, classes, None), functional.cross_entropy(logits, classes.long()))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.tensor([0, 1]), r"labels: expected classes of shape \(4,\), found shape \(2,\); logits have \(4, 3\)"),
        (torch.tensor([0, 1, 2, 3]), "labels hold 3; expected 0 to 2"),
        (torch.tensor([0.5, 1, 2, 3]), r"labels: expected numbers of shape \(4, 3\), found shape \(4,\)"),
        (3, "labels: expected a tensor, found int"),
    ],
)
def test_labels_that_fit_no_logits_are_told(labels: Any, told: str):
    with pytest.raises(DataError, match=told):
        loss_of(torch.randn(4, 3), labels, None)


def test_a_model_survives_pickle():
    given = padded(5, 7)
    assert torch.equal(pickle.loads(pickle.dumps(network()))(**given).logits, network()(**given).logits)


def test_in_float64_it_decodes_as_it_reads():
    wide = hf.from_converted(bounded("model.layers.0")).double()
    given = ids(2, 6, 0)
    past = wide(given[:, :4], use_cache=True).past_key_values
    rest = wide(given[:, 4:], past_key_values=past).logits
    torch.testing.assert_close(rest, wide(given).logits[:, 4:], rtol=0, atol=1e-6)


def test_what_a_graph_can_not_be_asked_for_is_told():
    with pytest.raises(DataError, match="resize_token_embeddings: a graph has tables"):
        network().resize_token_embeddings(40)
    with pytest.raises(DataError, match="generate: this conversion is no causal language model"):
        hf.TheseanModel.generate(network())


@pytest.mark.parametrize("settings", [dict(attn_implementation="sdpa"), dict(use_cache=False)])
def test_auto_classes_take_what_transformers_loaders_take(settings: dict[str, Any], folder: Path):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, **settings)
    assert torch.equal(loaded(**padded(5, 7)).logits, network()(**padded(5, 7)).logits)
    assert loaded.config.use_cache is settings.get("use_cache", True)
    assert hf.from_pretrained(folder, **settings).config.use_cache is loaded.config.use_cache


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(config=3), "config: expected a configuration or a folder that has one, found 3"),
        (dict(generation_config=3), "generation_config: expected a GenerationConfig, found 3"),
        (dict(subfolder=3), "subfolder: expected a name, found 3"),
        (dict(max_bytes="1 GB"), "max_bytes: expected a whole number of bytes, found '1 GB'"),
    ],
)
def test_settings_of_another_type_are_told(settings: dict[str, Any], told: str, folder: Path):
    with pytest.raises(TheseanError, match=told):
        hf.from_pretrained(folder, **settings)


def test_a_language_model_is_no_classifier(folder: Path):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(DataError, match="is a causal language model: load it with AutoModelForCausalLM"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_weights_in_several_files_are_told(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ArtifactError, match="its weights lie in several files"):
        hf.from_pretrained(folder)


def _weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"somebody's")


def _config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"mine": 1}))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (_weights, "holds a model.safetensors without a config.json"),
        (_config, "holds a config.json of another program"),
    ],
)
def test_files_of_others_are_left_alone(made: Callable[[Path], None], told: str, tmp_path: Path):
    made(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match=told):
        hf.save_pretrained(counted(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("write", [hf.save_pretrained, hf.save_native])
def test_a_name_too_long_and_a_licence_that_is_none_are_told(write: Callable[..., Any], tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"File name too long\. Choose another name"):
        write(counted(), tmp_path / ("x" * 300))
    with pytest.raises(ArtifactError, match=r"licence: expected a name such as 'apache-2\.0', or None, found 3"):
        write(counted(), tmp_path / "x", licence=3)


def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(tmp_path: Path):
    larger = tokenizer()
    larger.add_tokens(["w99"])
    with pytest.raises(ExportError, match=f"its tokens go up to {VOCABULARY}, the network knows 0 to {VOCABULARY - 1}"):
        hf.save_pretrained(counted(), tmp_path / "x", tokenizer=larger)
    with pytest.raises(ExportError, match="tokenizer: expected a tokenizer or a folder of one, found Linear"):
        hf.save_pretrained(counted(), tmp_path / "x", tokenizer=torch.nn.Linear(1, 1))
    assert not (tmp_path / "x").exists()


def test_a_state_dict_that_is_none_or_of_another_network_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="state_dict: expected tensors by their names, found int"):
        network().save_pretrained(tmp_path / "x", state_dict=3)
    with pytest.raises(DataError, match="not this network's weights") as told:
        network().save_pretrained(tmp_path / "x", state_dict={"a": torch.ones(1)})
    assert "\n" not in str(told.value)
