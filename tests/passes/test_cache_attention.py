"""Kept attentions with keys and values as state: chunks and single steps equal the whole sequence.

B batch, T time, G heads of keys and values, K head width
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.causal_guides import ENDLESS, FAMILIES, WINDOW, attending, family
from tests.passes.contract import Example
from thesean.deploy.export import export
from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import run_in_chunks
from thesean.passes.cache_attention import CacheAttention
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.cache import CachedAttention, SeenKeys
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.thread_state import ThreadState, zero_states

FUSED = "aten.scaled_dot_product_attention.default"
CHUNKED = ((1,) * 12, (1, 5, 1, 5), (12,))
CACHED = list(FAMILIES)


def threaded(guide: Captured, graph_module: fx.GraphModule | None = None) -> fx.GraphModule:
    cached = CacheAttention(guide.signature)(graph_module or guide.graph_module).graph_module
    return ThreadState(guide.signature)(cached).graph_module


@cache
def threaded_family(name: str, masked: bool = False) -> fx.GraphModule:
    return threaded(family(name, masked=masked))


@torch.no_grad()
def assert_chunks_equal_whole(
    stateful: fx.GraphModule,
    guide: Captured,
    inputs: dict[str, torch.Tensor],
    chunked: tuple[tuple[int, ...], ...] = CHUNKED,
) -> None:
    """At every step, or where there is a mask at every token."""
    batch = next(iter(inputs.values())).shape[0]
    whole_BTV = leaf_values(guide.graph_module(**inputs))[0]
    tokens_BT = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(whole_BTV.shape[:2]) > 0
    for chunks in chunked:
        pieces, _ = run_in_chunks(stateful, guide.signature, inputs, zero_states(stateful, batch), chunks)
        got_BTV = torch.cat([piece[0] for piece in pieces], 1)
        torch.testing.assert_close(got_BTV[tokens_BT], whole_BTV[tokens_BT], rtol=1e-4, atol=1e-4)


def test_the_graph_before_and_after():
    guide = attending("fused")
    before = text(guide.graph_module.graph)
    after = text(CacheAttention(guide.signature)(guide.graph_module).graph_module.graph)
    assert text(guide.graph_module.graph) == before
    at = next(i for i, line in enumerate(before) if "scaled_dot_product_attention" in line)
    assert before[at - 1 : at + 2] == [
        "transpose_2 = aten.transpose.int(unflatten_2, 1, 2)",
        f"scaled_dot_product_attention = {FUSED}(transpose, transpose_1, transpose_2, None, 0.0, True)",
        "transpose_3 = aten.transpose.int(scaled_dot_product_attention, 1, 2)",
    ]
    assert after[:at] == before[:at]
    assert after[at:] == [
        "sym_size_int = aten.sym_size.int(ids, 0)",
        "sym_size_int_1 = aten.sym_size.int(ids, 1)",
        "ones_default = aten.ones.default([sym_size_int, sym_size_int_1], dtype=torch.bool, device=cpu)",
        "cache_0 = cache_0(ones_default)",
        "getitem = getitem(cache_0, 0)",
        "cache_1 = cache_1(transpose, transpose_1, transpose_2, getitem)",
        "getitem_1 = getitem(cache_1, 0)",
        "transpose_3 = aten.transpose.int(getitem_1, 1, 2)",
        *before[at + 2 :],
    ]


def test_what_stands_for_an_attention_is_of_its_module_and_shape():
    guide = attending("fused")
    (fused,) = (n for n in guide.graph_module.graph.nodes if str(n.target) == FUSED)
    nodes = {n.name: n for n in CacheAttention(guide.signature)(guide.graph_module).graph_module.graph.nodes}
    assert fused.meta["nn_module_stack"]
    for name in ("cache_1", "getitem_1"):
        assert nodes[name].meta["nn_module_stack"] == fused.meta["nn_module_stack"]
    assert nodes["getitem_1"].meta["val"].shape == fused.meta["val"].shape


def test_what_a_masks_positions_were_made_of_goes_with_it():
    guide = captured.gpt2()
    cached = CacheAttention(guide.signature)(guide.graph_module).graph_module
    made = [n.target for n in guide.graph_module.graph.nodes if n.target is torch.ops.aten.arange.default]
    left = [n.target for n in cached.graph.nodes if n.target is torch.ops.aten.arange.default]
    assert len(made) == 4
    assert len(left) == 1  # that of the table of positions


def test_layers_that_see_alike_share_what_they_see():
    stateful = threaded_family("gemma2")
    cap, core = "\n  scale=0.0625, cap=50", "\n  (core): Core(cached_attention, cap=50.0"
    kinds = [m for m in stateful.modules() if isinstance(m, (SeenKeys, CachedAttention))]
    assert [str(m) for m in kinds] == [
        f"SeenKeys(window={WINDOW})",
        f"CachedAttention({cap}, window={WINDOW}{core}, window={WINDOW})\n)",
        "SeenKeys()",
        f"CachedAttention({cap}{core}, window=None)\n)",
    ]
    assert [(s.shape, s.dtype) for s in stateful.meta["states"]] == [
        (("batch", f"past_of_{WINDOW}"), torch.bool),
        (("batch", 1, f"past_of_{WINDOW}", 8), torch.float32),
        (("batch", 1, f"past_of_{WINDOW}", 8), torch.float32),
        (("batch", "past"), torch.bool),
        (("batch", 1, "past", 8), torch.float32),
        (("batch", 1, "past", 8), torch.float32),
        (("batch",), torch.int64),
    ]


@pytest.mark.parametrize(
    "spelling",
    [
        "fused",
        "grouped",
        "stored",
        "packed",
        "single",
        "bent",
        "windowed",
        "leaning",
        "tabled",
        "sinking",
        "draining",
        "one_more",
    ],
)
def test_chunks_equal_the_whole_however_the_attention_is_written(spelling):
    guide = attending(spelling)
    stateful = threaded(guide)
    for batch in (1, 3):
        assert_chunks_equal_whole(stateful, guide, {"ids": models.tokens(batch, 12)})
    assert_chunks_equal_whole(stateful, guide, {"ids": models.tokens(2, 40)}, ((3, 30, 7),))


@pytest.mark.parametrize("window", [1, 2, 20])
def test_a_window_keeps_one_step_less_than_it_is_wide(window):
    guide = attending("windowed", window)
    stateful = threaded(guide)
    inputs = {"ids": models.tokens(2, 30)}
    assert_chunks_equal_whole(stateful, guide, inputs, ((1,) * 30, (7, 16, 7)))
    _, states = run_in_chunks(stateful, guide.signature, inputs, zero_states(stateful, 2), (17, 13))
    assert [tuple(s.shape) for s in states.values()] == [(2, window - 1), *[(2, 2, window - 1, 8)] * 2]


@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "mistral") else pytest.param(n, marks=pytest.mark.thorough) for n in CACHED]
)
def test_chunks_equal_the_whole_for_a_guide_of_each_family(name):
    guide, stateful = family(name), threaded_family(name)
    for batch in (1, 3):
        assert_chunks_equal_whole(stateful, guide, {"input_ids": models.tokens(batch, 12)})
    if name in ENDLESS:  # longer than max_position_embeddings
        assert_chunks_equal_whole(stateful, guide, {"input_ids": models.tokens(2, 90)}, ((80, 1, 9), (90,)))


def padded() -> dict[str, torch.Tensor]:
    """Rows that are padded on the left, in the middle, on the right, and not."""
    mask_BT = torch.ones(4, 12, dtype=torch.int64)
    mask_BT[0, :4] = mask_BT[1, 5:8] = mask_BT[2, -3:] = 0
    return {"input_ids": models.tokens(4, 12), "attention_mask": mask_BT}


@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "opt") else pytest.param(n, marks=pytest.mark.thorough) for n in CACHED]
)
def test_padded_steps_count_for_nothing_in_any_chunk(name):
    assert_chunks_equal_whole(threaded_family(name, masked=True), family(name, masked=True), padded())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "mistral") else pytest.param(n, marks=pytest.mark.thorough) for n in CACHED]
)
def test_rows_of_unequal_length_start_and_stop_alone(name):
    """The middle row of three ends, and another sequence starts there, its states zeros, while the others go on."""
    guide, stateful = family(name), threaded_family(name)
    ids_BT = models.tokens(3, 16)
    start = stateful(ids_BT[:, :7], *zero_states(stateful, 3).values())
    states = [s.clone() for s in start[1:]]
    for spec, state in zip(stateful.meta["states"], states, strict=True):
        assert spec.shape[0] == "batch"
        state[1] = 0
    got = []
    for t in range(7, 16):
        logits_B1V, *states = stateful(ids_BT[:, t : t + 1], *states)
        got.append(logits_B1V)
    got_BTV = torch.cat(got, 1)
    whole_BTV, anew_BTV = (guide.graph_module(x)["logits"] for x in (ids_BT, ids_BT[:, 7:]))
    for row, want in ((0, whole_BTV[0, 7:]), (1, anew_BTV[1]), (2, whole_BTV[2, 7:])):
        torch.testing.assert_close(got_BTV[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["gru", "linear-attention"])
def test_a_hybrid_carries_the_states_of_both_kinds(target):
    guide = captured.gpt2()
    torch.manual_seed(0)
    hybrid = build_hybrid(make_plan(guide, target), 1).graph_module.eval()
    stateful = threaded(guide, hybrid)
    assert len(stateful.meta["states"]) == 1 + 3 + 1
    replaced = replace(guide, graph_module=hybrid)
    assert_chunks_equal_whole(stateful, replaced, {"input_ids": models.tokens(3, 12)})


def test_an_encoder_and_a_network_without_time_are_left_alone():
    encoder = captured.bert()
    assert CacheAttention(encoder.signature)(encoder.graph_module).reason == "no causal attention is left in the graph"
    image = captured.resnet()
    assert CacheAttention(image.signature)(image.graph_module).reason == "there is no single dimension of time"


class ComplexRotary(nn.Module):
    """As Meta's Llama turns queries and keys: by complex numbers from a buffer; an MLP before each attention."""

    def __init__(self, rows: int = 64) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.qkvs = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        angle_TC = torch.arange(rows)[:, None] * 0.3 ** torch.arange(4)
        self.register_buffer("turns_TC", torch.polar(torch.ones_like(angle_TC), angle_TC), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mlp, qkv, out in zip(self.mlps, self.qkvs, self.outs, strict=True):
            x = x + mlp(x)
            heads = qkv(x).unflatten(2, (4, 8)).transpose(1, 2)
            query, key, value = heads.split((2, 1, 1), 1)
            turned = []
            for each in (query, key):
                pairs = torch.view_as_complex(each.float().unflatten(3, (4, 2)))
                turned.append(torch.view_as_real(pairs * self.turns_TC[: x.shape[1]]).flatten(3).type_as(each))
            query, key, value = turned[0], turned[1].repeat_interleave(2, 1), value.repeat_interleave(2, 1)
            later_TT = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores_BHTT = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(later_TT, -torch.inf)
            x = x + out((scores_BHTT.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x


def test_queries_turned_by_complex_numbers_behind_another_module_are_cached_and_exported(tmp_path):
    guide = capture(models.seeded(ComplexRotary), models.vectors(3, 12, 16))
    hybrid = build_hybrid(make_plan(guide, "narrow")).graph_module
    assert_chunks_equal_whole(
        threaded(guide, hybrid), replace(guide, graph_module=hybrid), {"x": models.vectors(2, 12, 16)}
    )
    report = export(hybrid, guide.signature, tmp_path / "m.onnx")
    assert not report.note


class Frames(nn.Module):
    """Attends over every second step of its input, padded at the front."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (0, 0, 4, 0))[:, ::2]
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


def test_an_attention_over_other_steps_than_the_inputs_is_no_error_of_torchs():
    guide = capture(models.seeded(Frames), models.vectors(3, 12, 8))
    with pytest.raises(PassRefused, match="does not reproduce"):
        CacheAttention(guide.signature)(guide.graph_module)


def test_one_that_no_cache_stands_for_is_refused():
    guide = attending("strided")
    with pytest.raises(PassRefused, match="found a mask of another pattern"):
        CacheAttention(guide.signature)(guide.graph_module)


def example() -> Example:
    guide = captured.gpt2()
    return Example(CacheAttention(guide.signature), guide.graph_module, (models.tokens(3, 9),))
