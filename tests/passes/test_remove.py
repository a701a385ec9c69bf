"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch

from tests import captured
from tests.captured import text
from tests.models import tokens, vectors
from thesean.errors import PassRefused
from thesean.passes.draft import make_draft
from thesean.passes.flow import data_flow
from thesean.passes.hybrid import build_hybrid
from thesean.passes.partition import partition
from thesean.passes.regions import Region
from thesean.passes.remove import Remove, removal, without_parts
from thesean.passes.substitute import clone
from thesean.targets.identity import Identity


def region_of(graph_module, path, granularity="block") -> Region:
    return next(p.region for p in partition(data_flow(graph_module.graph), granularity) if p.path == path)


def computed(graph) -> list[str]:
    return [line for line in text(graph) if "get_attr" not in line]


def test_a_branch_goes_with_its_sum_and_its_norm():
    graph_module = clone(captured.token_mixer().graph_module)
    assert computed(graph_module.graph)[:7] == [
        "x = placeholder x",
        "linear = aten.linear.default(x, mix_0_weight, mix_0_bias)",
        "cumsum = aten.cumsum.default(linear, 1)",
        "mul = aten.mul.Tensor(cumsum, 0.2)",
        "add = aten.add.Tensor(x, mul)",
        "linear_1 = aten.linear.default(add, wise_0_0_weight, wise_0_0_bias)",
        "gelu = aten.gelu.default(linear_1)",
    ]
    Remove("mix.0", region_of(graph_module, "mix.0", "sublayer"))(graph_module)
    assert computed(graph_module.graph)[:3] == [
        "x = placeholder x",
        "linear_1 = aten.linear.default(x, wise_0_0_weight, wise_0_0_bias)",
        "gelu = aten.gelu.default(linear_1)",
    ]
    assert not [n for n, _ in graph_module.named_parameters() if n.startswith("mix.0")]


def test_a_whole_block_becomes_its_entry():
    guide = captured.gpt2(3).graph_module
    graph_module = clone(guide)
    region = region_of(graph_module, "transformer.h.1")
    assert removal(region) == (region.exit, region.entry)
    Remove("transformer.h.1", region)(graph_module)
    assert not [n for n, _ in graph_module.named_parameters() if ".h.1." in n]
    shorter = clone(guide)
    for path in ("attn", "mlp"):  # the same, half by half
        Remove(path, region_of(shorter, f"transformer.h.1.{path}", "sublayer"))(shorter)
    ids = tokens(3, 7)
    assert torch.equal(graph_module(ids)["logits"], shorter(ids)["logits"])


def test_a_part_that_changes_the_shape_becomes_zeros_of_its_output():
    graph_module = clone(captured.resnet().graph_module)
    region = region_of(graph_module, "blocks.2")
    assert removal(region) is None
    Remove("blocks.2", region)(graph_module)
    x = vectors(4, 1, 8, 8)
    assert graph_module(x).shape == (4, 5)
    assert torch.equal(graph_module(x)[0], graph_module(x)[1])  # nothing of the image comes through


def test_a_module_has_nothing_to_stand_for_where_the_shape_changes():
    graph_module = clone(captured.resnet().graph_module)
    with pytest.raises(PassRefused, match=r"blocks\.2: expected a part that keeps the shape"):
        Remove("blocks.2", region_of(graph_module, "blocks.2"), "part_0", Identity())(graph_module)


def test_a_region_of_another_graph_is_refused():
    graph_module = clone(captured.gpt2().graph_module)
    region = region_of(captured.gpt2().graph_module, "transformer.h.0")
    with pytest.raises(PassRefused, match="another graph"):
        Remove("transformer.h.0", region)(graph_module)


@pytest.mark.parametrize("granularity", ["block", "sublayer", "finest"])
@pytest.mark.parametrize(("name", "target"), [("gpt2", "gru"), ("bert", "gru"), ("encoder", "rnn"), ("resnet", "mlp")])
def test_the_ceiling_keeps_nothing_of_what_is_replaced_and_all_else(name, target, granularity):
    guide = getattr(captured, name)()
    draft = make_draft(guide, target, granularity=granularity)
    ceiling = without_parts(draft)
    out, want = ceiling(**guide.example), guide.graph_module(**guide.example)
    first, second = (next(iter(o.values())) if isinstance(o, dict) else o for o in (out, want))
    assert first.shape == second.shape
    gone = {n.name for p in draft.parts for s in p.sites for n in s.region.nodes}
    left = {n.name for n in ceiling.graph.nodes}
    assert not gone & left
    sums = [p.numel() for p in ceiling.parameters()]
    assert sum(sums) < sum(p.numel() for p in guide.graph_module.parameters())


def test_dropping_with_identity_computes_what_the_ceiling_computes():
    guide = captured.gpt2(3)
    draft = make_draft(guide, {"*attn*": "identity", "*mlp*": "keep"})
    ids = tokens(3, 7)
    hybrid = build_hybrid(draft)
    assert torch.equal(hybrid.graph_module(ids)["logits"], without_parts(draft)(ids)["logits"])
    first = hybrid.replacements[0]
    assert (first.guide_entry, first.guide_exit) == ("add_1", "add_4")  # the stream before and after
    assert hybrid.boundaries[0] == (first.exit, "add_4")
