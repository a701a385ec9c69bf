"""H heads, C width of a head"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import zoo
from tests import models
from tests.passes.analyse.test_distance_bias import all_facts, small
from thesean.targets.shared.facts import AttentionFacts

pytestmark = pytest.mark.thorough  # tests/passes/plan/test_windowed_guides.py has one of each kind


def drawn(name: str, **settings: object) -> nn.Module:
    """With norms' weights that are not all ones."""
    model = small(name, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or p.shape[-1] == 8:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
    return model


def check(facts: AttentionFacts, form: str | None, weights: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert facts.plain
    assert facts.norms is not None
    assert facts.norm_form == form
    for norm, weight in zip(facts.norms, weights, strict=True):
        torch.testing.assert_close(norm.weight, weight.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma3ForCausalLM", "Exaone4ForCausalLM"])
def test_one_weight_for_all_heads(name):
    model = drawn(name)
    attention = model.model.layers[0].self_attn
    gain = 1.0 if name.startswith("Gemma") else 0.0  # its weight is added to one
    weights = (attention.q_norm.weight + gain, attention.k_norm.weight + gain)
    check(all_facts(model, zoo.tokens(2, 12, 0))[0], None, weights)


@pytest.mark.parametrize("name", ["Olmo2ForCausalLM", "Olmo3ForCausalLM"])
def test_one_norm_over_the_whole_width_before_heads_are_split(name):
    model = drawn(name)
    attention = model.model.layers[0].self_attn
    query, key = (norm.weight.view(-1, 8) for norm in (attention.q_norm, attention.k_norm))
    facts = all_facts(model, zoo.tokens(2, 12, 0))[0]
    check(facts, "whole", (query, key.repeat_interleave(2, 0)))
    assert facts.rotation is not None


def test_a_weight_for_each_head_about_its_mean():
    model = drawn("CohereForCausalLM", use_qk_norm=True)
    attention = model.model.layers[0].self_attn
    weights = (attention.q_norm.weight, attention.k_norm.weight.repeat_interleave(2, 0))
    check(all_facts(model, zoo.tokens(2, 12, 0))[0], "heads", weights)


def test_layer_norms_of_stablelm_one_a_head():
    model = drawn("StableLmForCausalLM", qk_layernorm=True)
    attention = model.model.layers[0].self_attn
    norms = (attention.q_layernorm, attention.k_layernorm)
    query, key = (torch.stack([n.weight for n in norm.norms]) for norm in norms)
    check(all_facts(model, zoo.tokens(2, 12, 0))[0], "heads", (query, key.repeat_interleave(2, 0)))


def test_layer_norms_with_a_bias():
    model = drawn("PersimmonForCausalLM")
    attention = model.model.layers[0].self_attn
    facts = all_facts(model, zoo.tokens(2, 12, 0))[0]
    norms = (attention.q_layernorm, attention.k_layernorm)
    assert facts.norms is not None
    check(facts, "heads", tuple(norm.weight for norm in norms))
    for found, norm in zip(facts.norms, norms, strict=True):
        assert found.bias is not None
        torch.testing.assert_close(found.bias, norm.bias.detach(), rtol=1e-3, atol=1e-4)


class Halved(nn.Module):
    """Queries normed and keys not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(self.norm(q), k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_a_norm_on_one_side_alone_is_told():
    (facts,) = all_facts(models.seeded(Halved), models.vectors(2, 6, 16))
    assert not facts.plain
    assert facts.differs == "queries and keys that are changed before they meet"
