"""B batch, T time"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import thesean
from tests.captured import shared
from tests.guides import _masked, bert, gpt2, llama, opt, qwen2
from tests.hf.converted import tokenizer
from tests.models import VOCABULARY, spread
from tests.tolerances import VALUE, relative_error
from thesean import hf
from thesean.converted import Converted
from thesean.errors import NativeError

SLOW = pytest.mark.slow
GUIDES = {"gpt2": gpt2, "bert": bert, "llama": llama, "opt": opt, "qwen2": qwen2}


_RENEWED = {"dtype", "architectures", "transformers_version", "id2label"}  # as a configuration is saved


def four() -> Any:
    """Four layers, four heads on two, tied words: the same numbers in several places."""
    sizes = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, tie_word_embeddings=True, **sizes)
    )


@shared
def converted(name: str, target: str, merge: int | None = None, keep: str = "") -> Converted:
    torch.manual_seed(0)
    guide = spread((four() if name == "four" else GUIDES[name]()).eval())
    data = [_masked(3, 12, seed) for seed in range(2)]
    keeps = [keep] if keep else []
    return thesean.compile(guide, target, recipe="fast", data=data, merge=merge, keep=keeps, progress=False)


@pytest.mark.parametrize(
    ("name", "target", "merge", "changes"),
    [
        ("four", "narrow", None, {"intermediate_size": 16, "mlp_bias": True}),
        pytest.param(
            "four",
            "narrow-heads",
            None,
            {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True},
            marks=SLOW,
        ),
        ("four", "gqa", None, {"num_key_value_heads": 1, "attention_bias": True}),
        ("four", "copy", 2, {"num_hidden_layers": 2, "num_attention_heads": 4}),
        ("gpt2", "narrow", None, {"n_inner": 32}),  # None in the guide's: four times the width
        pytest.param("gpt2", "copy", 2, {"n_layer": 1, "n_head": 2}, marks=SLOW),  # as many heads as layers
        pytest.param("opt", "narrow", None, {"ffn_dim": 16}, marks=SLOW),
        pytest.param(
            "bert", "narrow", None, {"intermediate_size": 16}, marks=SLOW
        ),  # built without the pooler that a configuration has
        pytest.param("qwen2", "copy", 2, {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, marks=SLOW),
    ],
)
def test_fewer_of_the_same_is_a_network_of_the_guides_class(name, target, merge, changes):
    smaller = converted(name, target, merge)
    model, told = hf.to_native(smaller), smaller.signature.guide
    assert f"{type(model).__module__}.{type(model).__qualname__}" == told.path
    got = model.config.to_dict()
    assert {key: got[key] for key in changes} == changes
    others = told.config.keys() & got.keys() - changes.keys() - _RENEWED
    assert {key: got[key] for key in others} == {key: told.config[key] for key in others}
    inputs = _masked(4, 9, 7)
    shown = inputs["attention_mask"].bool()  # what is hidden is anybody's
    found, want = (network(**inputs)[0].detach()[shown] for network in (model, smaller))
    assert relative_error(found, want) < VALUE[torch.float32]


def test_a_checkpoint_is_read_without_thesean_and_says_what_it_is(tmp_path: Path):
    smaller = converted("four", "narrow")
    saved = hf.save_native(smaller, tmp_path / "native", tokenizer=tokenizer(), licence="mit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(loaded) is LlamaForCausalLM
    inputs = _masked(2, 8, 3)
    assert torch.equal(loaded(**inputs).logits, saved.eval()(**inputs).logits)
    card = (tmp_path / "native" / "README.md").read_text()
    assert "Licence of the guide: mit" in card
    assert 'LlamaForCausalLM.from_pretrained("FOLDER")' in card
    assert not (tmp_path / "native" / "graph.json").exists()


def test_a_saved_conversion_can_be_written_back_later(tmp_path: Path):
    converted("four", "narrow").save(tmp_path / "saved")
    later = hf.to_native(thesean.load(tmp_path / "saved"))
    assert later.config.intermediate_size == 16


@pytest.mark.parametrize(
    ("name", "target", "keep", "told"),
    [
        pytest.param(
            "llama", "rnn", "", r"model\.layers\.0\.self_attn: rnn fits no network of the guide's class", marks=SLOW
        ),
        pytest.param(
            "qwen2", "narrow", "", r"model\.layers\.0\.mlp: the bias of a linear map has no place", marks=SLOW
        ),
        pytest.param("gpt2", "narrow-heads", "", r"transformer\.h\.0\.attn: matrices of .* have no place", marks=SLOW),
        ("four", "narrow", "model.layers.1", r"model\.layers\.\d\.mlp.* No LlamaForCausalLM is this network"),
        ("four", "identity", "", "nothing of the conversion stands for it"),
    ],
)
def test_what_no_configuration_gives_is_refused_by_the_part(name, target, keep, told):
    with pytest.raises(NativeError, match=told):
        hf.to_native(converted(name, target, keep=keep))


def test_weights_that_fit_and_compute_something_else_are_refused():
    smaller = converted("four", "copy", 2)
    guide = smaller.signature.guide
    assert guide is not None
    other = {**guide.config, "rms_norm_eps": 0.5}
    wrong = Converted(
        smaller.module,
        replace(smaller.signature, guide=replace(guide, config=other)),
        smaller.plan,
        smaller.report,
    )
    with pytest.raises(NativeError, match="the weights have a place, but the outputs are"):
        hf.to_native(wrong)


@pytest.mark.parametrize(
    "path", ["os.system", "transformers.models.llama.modeling_llama.apply_rotary_pos_emb", "transformers.Trainer"]
)
def test_a_file_names_no_other_code_than_models_of_transformers(path):
    smaller = converted("four", "copy", 2)
    assert smaller.signature.guide is not None
    guide = replace(smaller.signature.guide, path=path, record=None)
    named = Converted(smaller.module, replace(smaller.signature, guide=guide), smaller.plan, smaller.report)
    with pytest.raises(NativeError, match="is no model class of transformers"):
        hf.to_native(named)


def test_a_guide_without_a_configuration_is_told():
    smaller = converted("four", "copy", 2)
    bare = Converted(smaller.module, replace(smaller.signature, guide=None), smaller.plan, smaller.report)
    with pytest.raises(NativeError, match="the guide has no configuration"):
        hf.to_native(bare)
