"""A window that holds the whole sequence is the guide's own softmax attention: for whatever the guide does there.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from benchmarks import zoo
from tests.kept_captures import capture
from tests.passes.analyse.test_distance_bias import small
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target

WINDOW, LONGER = 64, 40

LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "head_dim": 4,
    "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip

GUIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "alibi as an addend": ("BloomForCausalLM", {}),
    "alibi on the mask": ("MptForCausalLM", {}),
    "alibi in a mask for all layers": ("FalconForCausalLM", {"alibi": True}),
    "alibi with heads of their own": ("FalconForCausalLM", {"alibi": True, "multi_query": False}),
    "scores in three dimensions": ("XGLMForCausalLM", {"attention_heads": 4}),
    "a sliding window": ("MistralForCausalLM", {"sliding_window": 6}),
    "a local layer": ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "norms over the whole width": ("Olmo2ForCausalLM", {}),
    "norms of each head": ("Exaone4ForCausalLM", {}),
    "norms about the mean": ("CohereForCausalLM", {"use_qk_norm": True}),
    "a norm for each head": ("StableLmForCausalLM", {"qk_layernorm": True}),
    "norms with a bias": ("PersimmonForCausalLM", {}),
    "neither a norm nor a bias": ("CohereForCausalLM", {}),
    "a latent, neighbours turned": ("DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "latents of keys and of queries": ("DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": 12}),
    "a latent, complex numbers turned": ("DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "latents, halves turned": ("MiniCPM3ForCausalLM", {**LATENT, "q_lora_rank": 12}),
}


# while one works, a bias, a window, norms and a latent
FEW = ("alibi on the mask", "a local layer", "norms of each head", "a latent, neighbours turned")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.thorough) for n in GUIDES])
def test_a_window_that_holds_everything_is_the_guides_attention(name):
    class_name, settings = GUIDES[name]
    model = small(class_name, **settings)
    plan = make_plan(capture(model, zoo.tokens(2, 12, 0)), Target("linear-attention", window=WINDOW))
    assert [len(p.sites) for p in plan.parts] == [1, 1]
    inputs = zoo.tokens(2, LONGER, 3)
    with torch.no_grad():
        found, wanted = build_hybrid(plan).graph_module(**inputs)["logits"], model(**inputs).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM"])
def test_padding_is_left_out_of_the_distances(name, side):
    model = small(name)
    plan = make_plan(capture(model, zoo.masked(2, 12, 0)), Target("linear-attention", window=WINDOW))
    module = build_hybrid(plan).graph_module
    ids = zoo.ids(2, 20, 5)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    with torch.no_grad():
        found = module(ids, mask)["logits"]
        wanted = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-3, atol=1e-4)


def test_a_decoder_with_a_table_of_relative_positions_keeps_it():
    model = small("T5ForConditionalGeneration")
    target: dict[str, str | Target] = {"decoder.block.*.layer.0*": Target("linear-attention", window=200), "*": "keep"}
    plan = make_plan(capture(model, zoo.seq2seq(2, 12, 0)), target, granularity="sublayer")
    inputs = zoo.seq2seq(2, 150, 3)  # past the distances that the table tells apart
    with torch.no_grad():
        found, wanted = build_hybrid(plan).graph_module(**inputs)["logits"], model(**inputs).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["T5EncoderModel", "MPNetModel"])
def test_narrow_heads_that_keep_all_are_an_encoder_with_a_table_of_relative_positions(name):
    model = small(name)
    plan = make_plan(capture(model, zoo.tokens(2, 12, 0)), Target("narrow-heads", ratio=1))
    inputs = zoo.tokens(2, 150, 3)
    if name == "MPNetModel":  # its own positions end before that
        inputs = zoo.tokens(2, 60, 3)
    with torch.no_grad():
        found, wanted = build_hybrid(plan).graph_module(**inputs), model(**inputs)
    torch.testing.assert_close(found["last_hidden_state"], wanted.last_hidden_state, rtol=1e-3, atol=1e-4)


def test_a_capped_guide_is_told_in_the_plan():
    guide = capture(small("Gemma2ForCausalLM"), zoo.tokens(2, 12, 0))
    notes = make_plan(guide, Target("linear-attention", window=WINDOW)).plan.notes
    told = [note for note in notes if "window" in note]
    assert told == ["model.layers.0, model.layers.1: their window is not the guide's softmax: a cap on the scores"]
    assert not [n for n in make_plan(guide, Target("linear-attention", window=0)).plan.notes if "window" in n]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BloomForCausalLM", "Olmo2ForCausalLM"])
def test_a_fast_conversion_is_saved_loaded_and_exported_with_it(name, tmp_path):
    pytest.importorskip("onnxruntime")
    model: nn.Module = small(name)
    data = [zoo.tokens(4, 24, seed) for seed in range(4)]
    converted = thesean.compile(
        model, Target("linear-attention", window=WINDOW), data=data, recipe="fast", progress=False
    )
    inputs = zoo.tokens(2, LONGER, 9)
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert float((converted(**inputs).logits - wanted).abs().max() / wanted.abs().max()) < 1e-4
        converted.save(tmp_path / "saved")
        again = thesean.load(tmp_path / "saved")
        torch.testing.assert_close(again(**inputs).logits, converted(**inputs).logits, rtol=0, atol=0)
    again.export(tmp_path / "model.onnx")
