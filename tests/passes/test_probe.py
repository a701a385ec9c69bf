"""B batch, T time, D width"""

from __future__ import annotations

import pytest

from tests import captured
from thesean.passes.partition import partition
from thesean.passes.probe import probe_mixing
from thesean.passes.regions import module_regions


def mixing(guide, granularity="block", time=11):
    values = captured.recorded(guide, time)
    return {p.path: probe_mixing(p.region, values) for p in partition(captured.flow_of(guide), granularity)}


@pytest.mark.parametrize("guide", [captured.gpt2, captured.llama, captured.token_mixer])
def test_blocks_of_language_models_are_causal(guide):
    assert set(mixing(guide()).values()) == {"causal"}


@pytest.mark.parametrize("guide", [captured.bert, captured.encoder])
def test_blocks_of_encoders_look_both_ways(guide):
    assert set(mixing(guide()).values()) == {"bidirectional"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mlps_of_a_transformer_are_token_wise(attention):
    found = mixing(captured.gpt2(attention=attention), "sublayer")
    assert {path: m for path, m in found.items() if path.endswith("mlp")} == {
        "transformer.h.0.mlp": "none",
        "transformer.h.1.mlp": "none",
    }
    assert {m for path, m in found.items() if path.endswith("attn")} == {"causal"}


def test_norms_are_token_wise():
    guide = captured.gpt2()
    norm = module_regions(captured.flow_of(guide))["transformer.h.1.ln_1"]
    assert probe_mixing(norm, captured.recorded(guide)) == "none"


def test_feature_maps_have_no_direction_and_vectors_no_tokens():
    assert set(mixing(captured.resnet()).values()) == {"bidirectional"}
    assert set(mixing(captured.mlp()).values()) == {"none"}


def test_three_tokens_are_enough():
    assert set(mixing(captured.gpt2(), time=3).values()) == {"causal"}
