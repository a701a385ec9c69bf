"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import captured
from tests.models import tokens, vectors
from tests.passes.contract import Example
from thesean.errors import PassRefused
from thesean.passes.analyse.bypass import removal
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import Region
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text
from thesean.passes.plan.ceiling import without_parts
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition
from thesean.passes.remove import Remove
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


@pytest.mark.thorough
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


def test_a_region_with_more_than_one_entry_is_refused():
    graph_module = clone(captured.gpt2().graph_module)
    region = region_of(graph_module, "transformer.h.0")
    broken = Region(entry=region.entry, exit=region.exit, nodes=region.nodes[2:])
    before = text(graph_module.graph)
    with pytest.raises(PassRefused, match=r"transformer\.h\.0: expected one entry and one exit"):
        Remove("transformer.h.0", broken)(graph_module)
    assert text(graph_module.graph) == before


def test_a_region_of_another_graph_is_refused():
    graph_module = clone(captured.gpt2().graph_module)
    region = region_of(captured.gpt2().graph_module, "transformer.h.0")
    with pytest.raises(PassRefused, match="another graph"):
        Remove("transformer.h.0", region)(graph_module)


@pytest.mark.parametrize("granularity", ["block", "sublayer", "finest"])
@pytest.mark.parametrize(("name", "target"), [("gpt2", "gru"), ("bert", "gru"), ("encoder", "rnn"), ("resnet", "mlp")])
def test_the_ceiling_keeps_nothing_of_what_is_replaced_and_all_else(name, target, granularity):
    guide = getattr(captured, name)()
    bound_plan = make_plan(guide, target, granularity=granularity)
    ceiling = without_parts(bound_plan)
    out, want = ceiling(**guide.example), guide.graph_module(**guide.example)
    first, second = (next(iter(o.values())) if isinstance(o, dict) else o for o in (out, want))
    assert first.shape == second.shape
    gone = {n.name for p in bound_plan.parts for s in p.sites for n in s.region.nodes}
    left = {n.name for n in ceiling.graph.nodes}
    assert not gone & left
    sums = [p.numel() for p in ceiling.parameters()]
    assert sum(sums) < sum(p.numel() for p in guide.graph_module.parameters())


def test_dropping_with_identity_computes_what_the_ceiling_computes():
    guide = captured.gpt2(3)
    bound_plan = make_plan(guide, {"*attn*": "identity", "*mlp*": "keep"})
    ids = tokens(3, 7)
    hybrid = build_hybrid(bound_plan)
    assert torch.equal(hybrid.graph_module(ids)["logits"], without_parts(bound_plan)(ids)["logits"])
    first = hybrid.replacements[0]
    assert (first.guide_entry, first.guide_exit) == ("add_1", "add_4")  # the stream before and after
    assert hybrid.boundaries[0] == (first.exit, "add_4")


class Parallel(nn.Module):
    """x + (attention(norm(x)) + mlp(norm(x))), one norm for both, as GPT-J and GPT-NeoX have it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + (self.mix(h).cumsum(1) * 0.1 + self.mlp(h))


def stack(block: type[nn.Module]) -> tuple[nn.Sequential, Captured]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), block(), block(), block(), nn.Linear(16, 5))
    model.eval()
    return model, capture(model, vectors(3, 6, 8))


def test_of_two_parallel_branches_both_may_go():
    model, guide = stack(Parallel)
    bound_plan = make_plan(guide, "identity", granularity="sublayer")
    assert len(bound_plan.parts) == 6
    hybrid = build_hybrid(bound_plan)
    x = vectors(2, 7, 8)
    expected = model[4](model[0](x))
    assert torch.equal(hybrid.graph_module(x), expected)
    assert torch.equal(without_parts(bound_plan)(x), expected)
    assert (
        bound_plan.plan.new_params
        == sum(p.numel() for p in hybrid.graph_module.parameters())
        == 8 * 16 + 16 + 16 * 5 + 5
    )
    nodes = {n.name for n in hybrid.graph_module.graph.nodes}
    theirs = {n.name for n in guide.graph_module.graph.nodes}
    assert all(own in nodes and other in theirs for own, other in hybrid.boundaries)


def test_of_two_parallel_branches_one_may_go_and_the_other_become_something_else():
    model, guide = stack(Parallel)
    bound_plan = make_plan(guide, {"*mlp": "identity", "*mix": "keep"}, granularity="sublayer")
    x = vectors(2, 7, 8)
    expected = model[0](x)
    for block in list(model)[1:4]:
        expected = expected + block.mix(block.norm(expected)).cumsum(1) * 0.1
    torch.testing.assert_close(build_hybrid(bound_plan).graph_module(x), model[4](expected))
    both = make_plan(guide, {"*mlp": "identity", "*mix": "gru"}, granularity="sublayer")
    hybrid = build_hybrid(both)
    assert both.plan.new_params == sum(p.numel() for p in hybrid.graph_module.parameters())
    assert hybrid.graph_module(x).shape == (2, 7, 5)


def test_a_map_inside_of_a_branch_goes_alone():
    """x + b(tanh(a(x))): b reads no stream, so that dropping it leaves tanh(a(x)) to be added."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(torch.tanh(self.a(x)))

    model, guide = stack(Inner)
    bound_plan = make_plan(guide, {"*.b": "identity", "*.a": "keep"}, granularity="finest")
    hybrid = build_hybrid(bound_plan)
    x = vectors(2, 7, 8)
    expected = model[0](x)
    for block in list(model)[1:4]:
        expected = expected + torch.tanh(block.a(expected))
    torch.testing.assert_close(hybrid.graph_module(x), model[4](expected))
    replaced = make_plan(guide, {"*.b": "identity", "*.a": "linear"}, granularity="finest")
    assert replaced.plan.new_params == sum(p.numel() for p in build_hybrid(replaced).graph_module.parameters())


def test_a_sum_that_scales_its_stream_is_no_residual_one():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(self.mlp(x), x, alpha=2)

    _, guide = stack(Scaled)
    for part in make_plan(guide, "linear", granularity="sublayer").parts:
        found = removal(part.region)
        assert found is None or found[1] is part.region.entry
        assert found is None or found[0] is part.region.exit


def example() -> Example:
    graph_module = clone(captured.token_mixer().graph_module)
    removal_of_mix = Remove("mix.0", region_of(graph_module, "mix.0", "sublayer"))
    return Example(removal_of_mix, graph_module, (vectors(3, 6, 8),), same_outputs=False)


class Blocks(nn.Module):
    """Three blocks of two branches; `how` they are summed and normed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "after": nn.RMSNorm(8)})
            for _ in range(3)
        )

    def branch(self, block: nn.ModuleDict, name: str, x: torch.Tensor, without: str) -> torch.Tensor:
        return 0 * x if name == without else block[name](x).tanh() @ block[name].weight.T

    def forward(self, x: torch.Tensor, without: str = "") -> torch.Tensor:
        for block in self.blocks:
            a, b = (lambda y, n=name, k=block: self.branch(k, n, y, without) for name in "ab")
            if self.how == "stream first":
                y = block["norm"](x)
                x = x + a(y) + b(y)
            elif self.how == "stream last":
                y = block["norm"](x)
                x = a(y) + b(y) + x
            else:
                x = x + block["after"](a(x))
                x = x + block["after"](b(x))
        return x


@pytest.mark.parametrize("how", ["stream first", "stream last", "normed branches"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_each_branch_can_go_however_branches_are_summed_and_normed(how, name):
    torch.manual_seed(0)
    model = Blocks(how).eval()
    graph_module = clone(capture(model, vectors(2, 6, 8)).graph_module)
    names = [p.path for p in partition(data_flow(graph_module.graph), "sublayer")]
    assert len(names) == 6
    for path in names[{"a": 0, "b": 1}[name] :: 2]:
        Remove(path, region_of(graph_module, path, "sublayer"))(graph_module)
    x = vectors(4, 5, 8)
    torch.testing.assert_close(graph_module(x), model(x, without=name))
