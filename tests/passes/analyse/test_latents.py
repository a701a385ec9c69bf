"""What an attention is made of by linear maps, where that is more than its block reads.

B batch, T time, D width
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import captured
from tests.models import seeded, spread, tokens, vectors
from tests.remembering_guides import HEADS, WIDTH, GatedAttention, LatentAttention, Remembering, gated, latent
from thesean.deploy import Session
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.latents import Front, find_fronts
from thesean.passes.capture.capture import capture
from thesean.passes.graph.surgery import in_order
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan

# more than the texts here have
ALL = thesean.Target("rnn", window=32, sinks=0)
TURNED = ["halves", "neighbours", "complex", ""]


def fronts(guide: nn.Module, x: torch.Tensor) -> list[Front]:
    return find_fronts(data_flow(capture(guide, x).graph_module.graph))


def widths(front: Front) -> list[int]:
    return [source.meta["val"].shape[-1] for source in front.sources]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, [WIDTH, 4, 5]), ({"of_queries": True}, [7, 4, 5]), ({"written": "writes", "turned": ""}, [WIDTH, 4, 5])],
)
def test_the_sources_are_what_no_linear_map_makes_of_each_other_as_narrow_as_they_come(settings, wanted, monkeypatch):
    found = []
    monkeypatch.setattr("thesean.passes.latents_side_by_side._join", lambda graph, front: found.append(front))
    capture(latent(**settings), tokens(2, 9))
    assert [widths(front) for front in found] == [wanted] * 2


class WithoutNorms(nn.Module):
    """x_BTD -> y_BTD, two attentions in a row on a stream that nothing norms, and an MLP between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = GatedAttention(), GatedAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.one(x)
        x = x + self.mlp(x)
        return x + self.other(x)


class Normed(nn.Module):
    """x_BTD -> y_BTD with norms of all queries and all keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.norms[0](self.query(x)), self.norms[1](self.key(x)), self.value(x)
        query, key, value = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in read)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("guide", [WithoutNorms, Normed])
def test_what_reads_one_value_and_norms_of_queries_and_keys_have_none(guide: type[nn.Module]):
    assert fronts(seeded(guide), vectors(2, 9, WIDTH)) == []


@pytest.mark.parametrize("made", [captured.gpt2, captured.llama, captured.bert])
def test_usual_attentions_have_none(made):
    assert find_fronts(data_flow(made().graph_module.graph)) == []


@pytest.mark.parametrize("turned", TURNED)
@pytest.mark.parametrize(("of_queries", "written"), [(False, "writes"), (True, "cat")])
def test_such_an_attention_is_read_whole_and_replaced_exactly_where_a_window_holds_all(turned, of_queries, written):
    guide = latent(turned=turned, of_queries=of_queries, written=written)
    bound_plan = make_plan(capture(guide, tokens(2, 9)), ALL)
    parts = [p for p in bound_plan.parts if p.target is not None]
    assert len(parts) == 2
    for part in parts:
        facts = part.sites[0].facts.attention
        assert facts is not None
        assert facts.plain, facts.differs
        assert facts.widths == (6, 3)
        assert (facts.rotation is None) == (turned == "")
        assert facts.rotation is None or sorted(facts.rotation.angle) == pytest.approx([0.03, 1.0], abs=1e-5)
    hybrid = build_hybrid(bound_plan).graph_module
    ids = tokens(3, 20, seed=1)
    torch.testing.assert_close(hybrid(ids), guide(ids), rtol=1e-3, atol=1e-3)


def test_a_gate_behind_the_heads_stays_the_guides():
    guide = latent(gated=True)
    bound_plan = make_plan(capture(guide, tokens(2, 9)), ALL)
    assert all(p.sites[0].facts.attention.plain for p in bound_plan.parts if p.target is not None)
    hybrid = build_hybrid(bound_plan).graph_module
    ids = tokens(3, 20, seed=1)
    torch.testing.assert_close(hybrid(ids), guide(ids), rtol=1e-3, atol=1e-3)
    assert any(
        name.endswith("mixer_gate_weight") or "mixer.gate.weight" in name for name, _ in hybrid.named_parameters()
    )


@pytest.mark.parametrize("stateful", [True, False])
def test_where_it_stays_its_file_is_the_guides_with_its_keys_or_without(tmp_path, stateful: bool):
    guide, path = latent(written="writes"), tmp_path / "guide.onnx"
    made = thesean.export_guide(guide, path, example_inputs=(tokens(2, 9),), stateful=stateful)
    assert made.stateful == stateful
    ids = tokens(3, 20, seed=1)
    found = Session(path).run({"input_ids": ids.numpy()})[0]["output"]
    torch.testing.assert_close(torch.from_numpy(found), guide(ids), rtol=1e-3, atol=1e-4)


def test_a_conversion_decodes_step_by_step_and_comes_back_from_disk(tmp_path):
    guide = latent(of_queries=True)
    data = [tokens(2, 24, seed=seed) for seed in range(3)]
    converted = thesean.compile(guide, ALL, data=data, recipe="fast", progress=False)
    ids = tokens(1, 20, seed=1)
    torch.testing.assert_close(converted.module(ids), guide(ids), rtol=1e-3, atol=1e-3)
    converted.save(tmp_path / "kept")
    assert torch.equal(thesean.load(tmp_path / "kept").module(ids), converted.module(ids))
    converted.export(tmp_path / "m.onnx")
    session, state = Session(tmp_path / "m.onnx"), None
    outs = []
    for t in range(20):
        out, state = session.run({"input_ids": ids[:, t : t + 1].numpy()}, state)
        outs.append(torch.from_numpy(out["output"]))
    torch.testing.assert_close(torch.cat(outs, 1), converted.module(ids), rtol=1e-3, atol=1e-4)


def test_a_graph_is_put_in_order():
    graph = capture(spread(Remembering(LatentAttention()).eval()), tokens(2, 9)).graph_module.graph
    before = [node.name for node in graph.nodes]
    in_order(graph)
    assert [node.name for node in graph.nodes] == before
    last = next(node for node in graph.nodes if node.name == before[-2])
    graph.find_nodes(op="placeholder")[0].append(last)
    in_order(graph)
    graph.lint()
    assert [node.name for node in graph.nodes] == before


def test_a_gated_attention_of_one_value_is_as_it_was():
    assert fronts(gated(), tokens(2, 9)) == []
