"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from benchmarks import zoo
from tests import captured, models
from tests.captured import KERNELS
from tests.models import seeded, tokens, vectors
from thesean.errors import PlanError, TargetMismatchError
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import is_single_entry_single_exit
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.plan.partition import partition


def paths(guide, granularity="block", parts=None):
    return [p.path for p in partition(captured.flow_of(guide), granularity, parts)]


@pytest.mark.thorough
def test_twelve_blocks_of_gpt2_are_twelve_parts():
    guide = capture(models.gpt2(12, width=8), tokens())
    assert paths(guide) == [f"transformer.h.{k}" for k in range(12)]


@pytest.mark.parametrize("attention", KERNELS)
def test_sublayers_of_gpt2_are_its_attentions_and_mlps(attention):
    expected = [f"transformer.h.{k}.{half}" for k in range(2) for half in ("attn", "mlp")]
    assert paths(captured.gpt2(attention=attention), "sublayer") == expected


@pytest.mark.parametrize(
    ("guide", "blocks"),
    [
        (captured.bert, "encoder.layer"),
        (captured.llama, "model.layers"),
        (captured.encoder, "encoder.layers"),
    ],
)
def test_blocks_of_other_transformers_are_parts(guide, blocks):
    assert paths(guide()) == [f"{blocks}.0", f"{blocks}.1"]


def test_sublayers_of_other_transformers_are_parts():
    assert paths(captured.llama(), "sublayer")[:2] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert paths(captured.encoder(), "sublayer")[0] == "encoder.layers.0.self_attn"
    assert paths(captured.bert(), "sublayer")[0] == "encoder.layer.0.attention"


@pytest.mark.parametrize("name", ["CohereForCausalLM", "Olmo2ForCausalLM", "Gemma2ForCausalLM"])
def test_sublayers_beside_each_other_or_with_norms_after_them_are_modules(name):
    model = zoo.Specimen(name=name, build=zoo.from_config(name, {}), inputs=zoo.tokens, targets=()).model()
    found = paths(capture(model, zoo.tokens(2, 12, 0)), "sublayer")
    assert found == [f"model.layers.{k}.{half}" for k in range(2) for half in ("self_attn", "mlp")]


def test_blocks_that_change_the_stage_of_a_resnet_are_parts_too():
    assert paths(captured.resnet()) == [f"blocks.{k}" for k in range(6)]


def test_layers_of_a_plain_network_are_parts_and_its_head_is_not():
    assert paths(captured.mlp()) == ["0..1", "2..3", "4..5"]
    assert paths(captured.convnet()) == ["0..1", "2..3", "4..5"]


def test_blocks_without_modules_get_names_that_differ():
    assert paths(captured.functional()) == ["region", "region#2", "region#3"]


def test_residual_layers_without_an_exact_repeat_are_parts():
    assert paths(captured.tied()) == ["first", "second", "third"]


def test_branches_without_attention_are_sublayers():
    assert paths(captured.token_mixer(), "sublayer") == ["mix.0", "wise.0", "mix.1", "wise.1"]


def test_globs_name_the_outermost_modules_that_match():
    assert paths(captured.gpt2(), parts=["transformer.h.*"]) == ["transformer.h.0", "transformer.h.1"]
    assert paths(captured.gpt2(), parts=["*.mlp"]) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert paths(captured.gpt2(), parts=["transformer.h.1", "transformer.h.0.attn"]) == [
        "transformer.h.0.attn",
        "transformer.h.1",
    ]


def test_parts_that_overlap_are_refused():
    with pytest.raises(PlanError, match=r"parts 'transformer.h.0.*' and 'transformer.h.0.*' overlap"):
        paths(captured.gpt2(), parts=["transformer.h.0", "transformer.h.0.mlp"])


class Scaled(nn.Module):
    """x + block(x) / 2, where the block has residual branches of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.inner(x_BTD) * 0.5


def test_a_block_in_a_branch_has_its_own_sublayers():
    guide = capture(nn.Sequential(*(Scaled() for _ in range(2))).eval(), vectors(2, 6, 8))
    assert paths(guide) == ["0", "1"]
    halves = [f"{k}.inner.{half}" for k in range(2) for half in ("self_attn", "linear1..linear2")]
    assert paths(guide, "sublayer") == halves
    for target, inner in (("narrow-heads", ".self_attn"), ("rnn", ".self_attn"), ("narrow", ".linear1..linear2")):
        replaced = [part.replaces for part in make_plan(guide, target).plan]
        assert replaced == [(f"{k}.inner{inner}",) for k in range(2)], target


def test_a_glob_without_a_match_gives_the_near_name():
    with pytest.raises(PlanError, match=r"no part matches 'transformer\.g\.0'; did you mean 'transformer\.h\.0'\?"):
        paths(captured.gpt2(), parts=["transformer.g.0"])


def test_an_unknown_granularity_is_refused():
    with pytest.raises(PlanError, match="unknown granularity 'layer'; expected 'block', 'sublayer' or 'finest'"):
        paths(captured.gpt2(), "layer")


def test_a_network_of_one_layer_has_no_part_and_the_error_says_what_to_do():
    guide = capture(models.mlp(depth=0), vectors(2, 8))
    with pytest.raises(PlanError, match=r"found no repeated .* Name the parts yourself: parts=\[\.\.\.\]"):
        paths(guide)


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize(
    "guide", [captured.gpt2, captured.bert, captured.llama, captured.encoder, captured.resnet, captured.token_mixer]
)
def test_parts_are_disjoint_and_have_one_entry_and_one_exit(guide, granularity):
    flow = data_flow(guide().graph_module.graph)
    found = partition(flow, granularity)
    nodes = [n for part in found for n in part.region.nodes]
    assert len(nodes) == len(set(nodes))
    assert all(is_single_entry_single_exit(flow, part.region) for part in found)
    assert len({part.path for part in found}) == len(found)


class Gated(nn.Module):
    """Blocks that share a mask, which has its kind of the states before them."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(blocks))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        seen = mask.unsqueeze(-1).type_as(x)
        for block in self.blocks:
            x = x + seen * block(x)
        return self.head(x)


def test_what_takes_no_more_than_its_kind_of_a_stream_does_not_tie_blocks_together():
    inputs = {"x": vectors(3, 5, 8), "mask": torch.ones(3, 5, dtype=torch.int64)}
    guide = capture(models.seeded(Gated), inputs)
    assert paths(guide) == [f"blocks.{k}" for k in range(3)]
    planned = make_plan(guide, "linear")
    hybrid = build_hybrid(planned)
    assert hybrid.graph_module(**inputs).shape == (3, 5, 3)


class Pooled(nn.Module):
    """x_BTD -> y_B4, two recurrences, and a mean that is weighed where it is told."""

    def __init__(self, weighed: bool) -> None:
        super().__init__()
        self.before, self.cells = nn.Linear(6, 8), nn.GRU(8, 8, 2, batch_first=True)
        self.score, self.out, self.weighed = nn.Linear(8, 1), nn.Linear(8, 4), weighed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cells(self.before(x).tanh())[0]
        return self.out((self.score(x).softmax(1) * x).sum(1) if self.weighed else x.mean(1))


@pytest.mark.parametrize("weighed", [True, False])
def test_a_weighed_mean_is_not_all_that_a_network_is_made_of(weighed: bool):
    graph = capture(seeded(Pooled, weighed), vectors(2, 5, 6)).graph_module.graph
    paths = [part.path for part in partition(data_flow(graph))]
    assert paths == (["before", "cells.l0", "cells.l1", "score"] if weighed else ["cells.l0", "cells.l1"])


def test_several_cells_under_one_name_are_told_by_theirs():
    with pytest.raises(
        TargetMismatchError, match=r"cells\.l0, cells\.l1, each a cell of its own: parts=\['cells\.\*'\] takes them"
    ):
        thesean.plan(seeded(Pooled, False), "narrow", data=[vectors(2, 5, 6)], parts=["cells"])
    assert len(thesean.plan(seeded(Pooled, False), "narrow", data=[vectors(2, 5, 6)], parts=["cells.*"]).replaced) == 2


class Towers(nn.Module):
    """user_BD, item_BD -> (B), by a perceptron each."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = (nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2))

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


def test_a_perceptron_of_one_hidden_layer_is_a_part_and_so_is_each_of_two():
    alone = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    (row,) = thesean.plan(alone, "narrow", data=[vectors(4, 6)]).parts
    assert (row.path, row.new_params) == ("0..2", 6 * 8 + 8 + 8 * 3 + 3)
    both = thesean.plan(seeded(Towers), "narrow", data=[(vectors(4, 6), vectors(4, 6))])
    assert [part.path for part in both.replaced] == ["users", "items"]


def test_a_convolution_and_its_head_are_no_perceptron():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    graph = capture(model, torch.randn(2, 3, 5, 5)).graph_module.graph
    assert [part.path for part in partition(data_flow(graph))] == ["0"]
