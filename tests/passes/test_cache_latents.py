"""Attentions whose keys and values are made of a latent, with that latent as state: chunks equal the whole sequence.

B batch, T time, R width of the latent
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tests import captured, models
from tests.causal_guides import family
from tests.passes.contract import Example
from thesean.passes.analyse.chunks import run_in_chunks
from thesean.passes.cache_latents import CacheLatents
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.latent_cache import CachedLatent
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.thread_state import ThreadState, zero_states
from thesean.targets import Target

# as they are, turned and grouped, normed and turned, biased by the distance, in a window
GUIDES = [
    ("gpt2", False), ("gpt2", True), ("llama", True),
    *(pytest.param(name, False, marks=pytest.mark.thorough) for name in ("qwen3", "bloom", "mistral")),
]  # fmt: skip


def latent(guide: Captured) -> fx.GraphModule:
    return build_hybrid(make_plan(guide, Target("mla", rank=12)), 2).graph_module.eval()


@pytest.mark.parametrize(("name", "masked"), GUIDES)
@torch.no_grad()
def test_chunks_equal_the_whole(name, masked):
    guide = family(name, masked=masked)
    hybrid = latent(guide)
    cached = CacheLatents(guide.signature)(hybrid).graph_module
    stateful = ThreadState(guide.signature)(cached).graph_module
    shapes = [spec.shape for spec in stateful.meta["states"]]
    assert shapes.count(("batch", "past", 12)) == 2
    inputs = {"input_ids": models.tokens(2, 12, seed=3)}
    if masked:
        inputs["attention_mask"] = torch.tensor([[0, 0, 0, *[1] * 9], [1] * 12])
    whole_BTV = leaf_values(hybrid(**inputs))[0]
    token_BT = inputs["attention_mask"].bool() if masked else torch.ones(2, 12, dtype=torch.bool)
    for chunks in ((1,) * 12, (5, 1, 6)):
        pieces, _ = run_in_chunks(stateful, guide.signature, inputs, zero_states(stateful, 2), chunks)
        found_BTV = torch.cat([piece[0] for piece in pieces], 1)
        torch.testing.assert_close(found_BTV[token_BT], whole_BTV[token_BT], rtol=1e-4, atol=1e-4)


def test_the_graph_before_and_after():
    guide = captured.gpt2()
    hybrid = latent(guide)
    before = text(hybrid.graph)
    after = text(CacheLatents(guide.signature)(hybrid).graph_module.graph)
    assert text(hybrid.graph) == before
    first, second = (next(i for i, line in enumerate(before) if line.startswith(f"part_{n} = ")) for n in range(2))
    assert before[first] == "part_0 = part_0(layer_norm)"
    assert after == [
        *before[:first],
        "sym_size_int = aten.sym_size.int(input_ids, 0)",
        "sym_size_int_14 = aten.sym_size.int(input_ids, 1)",
        "ones_default = aten.ones.default([sym_size_int, sym_size_int_14], dtype=torch.bool, device=cpu)",
        "latent_0 = latent_0(ones_default)",
        "getitem = getitem(latent_0, 0)",
        "latent_1 = latent_1(layer_norm, getitem)",
        "getitem_1 = getitem(latent_1, 0)",
        before[first + 1].replace("part_0", "getitem_1"),
        *before[first + 2 : second],
        "latent_2 = latent_2(layer_norm_2, getitem)",
        "getitem_2 = getitem(latent_2, 0)",
        before[second + 1].replace("part_1", "getitem_2"),
        *before[second + 2 :],
    ]


def test_layers_that_see_alike_share_what_they_see():
    guide = captured.gpt2()
    cached = CacheLatents(guide.signature)(latent(guide)).graph_module
    kinds = [type(m).__name__ for m in cached.children() if type(m).__name__ in ("SeenKeys", "CachedLatent")]
    assert kinds == ["SeenKeys", "CachedLatent", "CachedLatent"]
    assert all(m.is_met_as_it_is for m in cached.modules() if isinstance(m, CachedLatent))


def test_a_guide_without_a_latent_is_left_alone():
    guide = captured.gpt2()
    result = CacheLatents(guide.signature)(guide.graph_module)
    assert result.reason == "no causal part has keys and values of one latent"


def test_what_reads_both_ways_has_nothing_to_remember():
    guide = captured.bert()
    hybrid = build_hybrid(make_plan(guide, Target("mla", rank=8)), 1).graph_module
    assert not CacheLatents(guide.signature)(hybrid).modified


def example() -> Example:
    guide = captured.gpt2()
    return Example(CacheLatents(guide.signature), latent(guide), (models.tokens(3, 9),))
