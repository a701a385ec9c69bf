"""State in, state out: single steps and chunks equal the whole sequence.

B batch, T time, D width
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.captured import KERNELS
from tests.passes.contract import Example
from tests.targets.contract import stateful_modules
from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import join, run_in_chunks
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.cast_floats import CastFloats
from thesean.passes.graph import graph_json
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import clone
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import TargetSpec, make_plan
from thesean.passes.thread_state import ThreadState, zero_states
from thesean.targets import Target

CHUNKS = (1, 5, 1, 4)


def converted(
    guide: Captured, target: TargetSpec = "gru", count: int | None = None
) -> tuple[fx.GraphModule, Signature]:
    torch.manual_seed(0)
    return build_hybrid(make_plan(guide, target), count).graph_module.eval(), guide.signature


def ids(time: int = sum(CHUNKS), batch: int = 3) -> dict[str, torch.Tensor]:
    return {"input_ids": models.tokens(batch, time)}


@torch.no_grad()
def assert_chunks_equal_whole(threaded: fx.GraphModule, stateless: fx.GraphModule, signature, inputs) -> None:
    batch = next(iter(inputs.values())).shape[0]
    for chunks in (CHUNKS, (1,) * sum(CHUNKS), (sum(CHUNKS),)):
        pieces, _ = run_in_chunks(threaded, signature, inputs, zero_states(threaded, batch), chunks)
        for index, whole in enumerate(leaf_values(stateless(**inputs))):
            joined = join([piece[index] for piece in pieces], whole.shape)
            assert isinstance(joined, torch.Tensor), joined
            torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", stateful_modules())
def test_chunks_with_state_equal_the_whole_sequence(target):
    stateless, signature = converted(captured.gpt2(), target)
    threaded = ThreadState(signature)(stateless).graph_module
    assert_chunks_equal_whole(threaded, stateless, signature, ids())


@pytest.mark.thorough
@pytest.mark.parametrize("window", [1, 3, 20])
@pytest.mark.parametrize("guide", [captured.gpt2, captured.llama])
def test_a_window_is_carried_beside_the_linear_state_of_each_part(guide, window):
    stateless, signature = converted(guide(), Target("linear-attention", window=window))
    threaded = ThreadState(signature)(stateless).graph_module
    states = [s.shape for s in threaded.meta["states"] if s.dtype == torch.float32]
    # two heads of keys and values, features beside the window's tokens and the first four, in two parts
    width = states[1][3] - states[0][3]
    assert [shape[1:3] for shape in states] == [(2, 2 * width), (2, 4 + window)] * 2
    assert_chunks_equal_whole(threaded, stateless, signature, ids())


class Words(nn.Module):
    """ids_BT -> y_BTD: words and positions, then the layer that becomes a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.table = nn.Embedding(8, 4), nn.Embedding(12, 4)
        self.cell = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.cell(self.words(ids) + self.table(torch.arange(ids.shape[1])))


def test_the_graph_before_and_after():
    captured = capture(models.seeded(Words), {"ids": models.tokens(2, 5) % 8})
    bound_plan = make_plan(captured, Target("gru", scope="part"), parts=["cell"])
    stateless = build_hybrid(bound_plan).graph_module.eval()
    before = [
        "ids = placeholder ids",
        "words_weight = get_attr words.weight",
        "table_weight = get_attr table.weight",
        "sym_size_int_2 = aten.sym_size.int(ids, 1)",
        "embedding = aten.embedding.default(words_weight, ids)",
        "arange = aten.arange.default(sym_size_int_2, device=cpu, pin_memory=False)",
        "embedding_1 = aten.embedding.default(table_weight, arange)",
        "add = aten.add.Tensor(embedding, embedding_1)",
        "part_0 = part_0(add)",
        "getitem = getitem(part_0, 0)",
        "return getitem",
    ]
    assert text(stateless.graph) == before
    assert text(ThreadState(captured.signature)(stateless).graph_module.graph) == [
        "ids = placeholder ids",
        "state_in_0 = placeholder state_in_0",
        "state_in_1 = placeholder state_in_1",
        *before[1:6],
        "unsqueeze_default = aten.unsqueeze.default(state_in_1, -1)",
        "add_tensor_1 = aten.add.Tensor(arange, unsqueeze_default)",
        "embedding_1 = aten.embedding.default(table_weight, add_tensor_1)",
        "add = aten.add.Tensor(embedding, embedding_1)",
        "part_0 = part_0(add, state_in_0)",
        "getitem_1 = getitem(part_0, 1)",
        "getitem = getitem(part_0, 0)",
        "sym_size_int = aten.sym_size.int(ids, 1)",
        "add_tensor = aten.add.Tensor(state_in_1, sym_size_int)",
        "return (getitem, getitem_1, add_tensor)",
    ]
    assert text(stateless.graph) == before


def test_the_graph_gains_a_state_a_part_and_one_for_the_positions():
    stateless, signature = converted(captured.gpt2())
    threaded = ThreadState(signature)(stateless).graph_module
    names = [str(n.target) for n in threaded.graph.find_nodes(op="placeholder")]
    assert names == ["input_ids", "state_in_0", "state_in_1", "state_in_2"]
    assert [(s.name, s.dtype, s.shape) for s in threaded.meta["states"]] == [
        ("state_in_0", torch.float32, ("batch", 16)),
        ("state_in_1", torch.float32, ("batch", 16)),
        ("state_in_2", torch.int64, ("batch",)),
    ]
    logits, *states, steps = threaded(**ids(time=4), **zero_states(threaded, 3))
    assert logits.shape == (3, 4, models.VOCABULARY)
    assert [tuple(s.shape) for s in states] == [(3, 16), (3, 16)]
    assert steps.tolist() == [4] * 3


def test_the_incoming_graph_and_its_flags_stay_and_parameters_are_shared():
    stateless, signature = converted(captured.gpt2())
    stateless.train()
    stateless.part_0.eval()
    before = [str(n.format_node()) for n in stateless.graph.nodes]
    threaded = ThreadState(signature)(stateless).graph_module
    assert [str(n.format_node()) for n in stateless.graph.nodes] == before
    assert stateless.training
    assert stateless.part_1.training
    assert not stateless.part_0.training
    assert {id(p) for p in threaded.parameters()} == {id(p) for p in stateless.parameters()}


def test_in_half_precision_what_float32_proved_is_threaded_without_a_run():
    stateless, signature = converted(captured.gpt2())
    proven = ThreadState(signature)(stateless).graph_module
    half = clone(stateless)
    CastFloats({torch.float32: torch.bfloat16})(half)
    threaded = ThreadState(signature, proven)(half).graph_module
    assert text(threaded.graph) == text(proven.graph)
    assert threaded.meta["rows_are_alone"] == proven.meta["rows_are_alone"]
    whole = half(**ids())
    first, second = ({k: v[:, part] for k, v in ids().items()} for part in (slice(0, 5), slice(5, None)))
    logits, *states = threaded(**first, **zero_states(threaded, 3))
    after, *_ = threaded(**second, **dict(zip(zero_states(threaded, 3), states, strict=True)))
    (want,) = leaf_values(whole)
    assert ((torch.cat([logits, after], 1) - want).abs().max() < 5e-2 * want.abs().max()).item()


def test_without_its_state_a_chunk_differs():
    stateless, signature = converted(captured.gpt2())
    threaded = ThreadState(signature)(stateless).graph_module
    second = {k: v[:, 5:] for k, v in ids().items()}
    forgetful = threaded(**second, **zero_states(threaded, 3))[0]
    whole = stateless(**ids())["logits"][:, 5:]
    assert (forgetful - whole).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["wrap", "drop"])
def test_positions_go_on_counting_past_the_table_when_they_are_bounded(mode):
    stateless, signature = converted(captured.gpt2())
    assert BoundPositions(mode)(stateless).modified
    threaded = ThreadState(signature)(stateless).graph_module
    inputs = {"input_ids": models.tokens(2, 100)}
    pieces, states = run_in_chunks(threaded, signature, inputs, zero_states(threaded, 2), (60, 1, 39))
    whole = stateless(**inputs)["logits"]
    torch.testing.assert_close(torch.cat([p[0] for p in pieces], 1), whole, rtol=1e-4, atol=1e-5)
    assert states["state_in_2"].tolist() == [100] * 2


class Lookup(nn.Module):
    """A causal language model by hand; `positions` and `pool` are where such models differ."""

    def __init__(self, positions: str = "slice", pool: str = "none", width: int = 16) -> None:
        super().__init__()
        self.positions, self.pool = positions, pool
        self.tokens = nn.Embedding(models.VOCABULARY, width)
        self.table = nn.Parameter(torch.randn(1, 40, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        if self.positions == "slice":
            at = self.table[:, :T]
        elif self.positions == "sum":
            at = self.table[0].index_select(0, torch.ones(T, dtype=torch.int64).cumsum(0) + 1)
        else:  # a running sum of what the caller gives
            at = nn.functional.embedding((x != 0).long().cumsum(1), self.table[0])
        h = self.tokens(x) + at
        h = self.layer(h, src_mask=torch.ones(T, T, dtype=torch.bool).triu(1))
        return {"none": lambda: h, "last": lambda: h[:, -1], "mean": lambda: h.mean(1)}[self.pool]()


def lookup(**settings: Any) -> tuple[fx.GraphModule, Signature]:
    torch.manual_seed(0)
    return converted(capture(Lookup(**settings).eval(), {"x": models.tokens(3, 11)}))


@pytest.mark.thorough
@pytest.mark.parametrize("positions", ["slice", "sum"])
@pytest.mark.parametrize("pool", ["none", "last"])
def test_positions_by_slice_and_by_running_sum_are_offset_and_a_last_step_may_be_read(positions, pool):
    stateless, signature = lookup(positions=positions, pool=pool)
    threaded = ThreadState(signature)(stateless).graph_module
    assert_chunks_equal_whole(threaded, stateless, signature, {"x": models.tokens(3, 11)})


def test_a_running_sum_over_what_the_caller_gives_goes_on_from_chunk_to_chunk():
    stateless, signature = lookup(positions="data")
    threaded = ThreadState(signature)(stateless).graph_module
    ids_BT = models.tokens(3, 11)
    ids_BT[0, 2:6] = ids_BT[1, :3] = 0  # what is not counted
    assert_chunks_equal_whole(threaded, stateless, signature, {"x": ids_BT})
    _, states = run_in_chunks(threaded, signature, {"x": ids_BT}, zero_states(threaded, 3), CHUNKS)
    assert states["state_in_1"].tolist() == (ids_BT != 0).sum(1).tolist()


@torch.no_grad()
def assert_a_row_starts_anew(threaded: fx.GraphModule, stateless: fx.GraphModule, first: int = 4) -> None:
    """The middle row of three, its states zeros, while the others go on."""
    ids_BT = models.tokens(3, 11)
    count = len(leaf_values(stateless(ids_BT)))
    before = threaded(ids_BT[:, :first], *zero_states(threaded, 3).values())
    states = [state.clone() for state in before[count:]]
    for spec, state in zip(threaded.meta["states"], states, strict=True):
        if spec.shape[0] == "batch":
            state[1] = 0
    after = threaded(ids_BT[:, first:], *states)[0]
    whole, anew = (leaf_values(stateless(x))[0] for x in (ids_BT, ids_BT[:, first:]))
    for row, wanted in ((0, whole[0, first:]), (1, anew[1]), (2, whole[2, first:])):
        torch.testing.assert_close(after[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "clamp", "wrap", "drop"])
def test_a_row_of_a_batch_starts_anew_while_the_others_go_on(mode):
    stateless, signature = converted(captured.gpt2())
    if mode is not None:
        assert BoundPositions(mode)(stateless).modified
    threaded = ThreadState(signature)(stateless).graph_module
    assert threaded.meta["rows_are_alone"]
    assert_a_row_starts_anew(threaded, stateless)


def test_rows_of_a_sliced_table_start_alone_as_well():
    stateless, signature = lookup(positions="slice")
    threaded = ThreadState(signature)(stateless).graph_module
    assert threaded.meta["states"][-1].shape == ("batch",)
    assert_a_row_starts_anew(threaded, stateless)


class Folded(Lookup):
    """Positions that go through a product of matrices on their way: no batch fits in front of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.mm(self.table[0].index_select(0, torch.arange(x.shape[1])), torch.eye(16))
        return self.layer(self.tokens(x) + at, src_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1))


def test_where_no_position_can_be_one_rows_one_count_serves_all_and_says_so():
    torch.manual_seed(0)
    stateless, signature = converted(capture(Folded().eval(), {"x": models.tokens(3, 11)}))
    threaded = ThreadState(signature)(stateless).graph_module
    assert threaded.meta["states"][-1].shape == (1,)
    assert not threaded.meta["rows_are_alone"]
    assert_chunks_equal_whole(threaded, stateless, signature, {"x": models.tokens(3, 11)})


def test_a_mean_over_time_is_refused_by_name():
    stateless, signature = lookup(pool="mean")
    with pytest.raises(PassRefused, match=r"mean \(aten.mean.dim\) mixes time"):
        ThreadState(signature)(stateless)


def test_rotary_positions_are_gone_with_the_attention_and_need_no_counter():
    stateless, signature = converted(captured.llama())
    threaded = ThreadState(signature)(stateless).graph_module
    assert all(s.dtype == torch.float32 for s in threaded.meta["states"])
    assert_chunks_equal_whole(threaded, stateless, signature, ids())


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("guide", [captured.gpt2, pytest.param(captured.llama, marks=pytest.mark.thorough)])
def test_an_attention_that_was_kept_is_refused_by_its_path(guide, attention):
    stateless, signature = converted(guide(attention=attention), count=1)
    with pytest.raises(PassRefused, match=r"(transformer\.h|model\.layers)\.1\.(self_)?attn .*Convert it too"):
        ThreadState(signature)(stateless)


class Backwards(nn.Module):
    """Claims to carry a state, and reads the sequence from its end."""

    stateful = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.core = nn.GRU(width, width, batch_first=True)

    def forward(self, x_BTD: torch.Tensor, state_BD: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        y_BTD, last = self.core(x_BTD.flip(1), None if state_BD is None else state_BD[None])
        return y_BTD.flip(1), last[0]


def test_a_part_that_looks_ahead_is_refused_by_name():
    stateless, signature = converted(captured.gpt2())
    stateless.part_1 = Backwards(16)
    with pytest.raises(PassRefused, match=r"getitem\w* .*mixes time"):
        ThreadState(signature)(stateless)


@pytest.mark.parametrize("target", [Target("rnn", causal=True), Target("gru", scope="part", causal=True)], ids=str)
def test_an_encoder_whose_parts_are_made_causal_is_a_stream(target):
    stateless, signature = converted(captured.bert(), target)
    inputs = {**ids(), "attention_mask": torch.ones(3, sum(CHUNKS), dtype=torch.long)}
    assert_chunks_equal_whole(ThreadState(signature)(stateless).graph_module, stateless, signature, inputs)


def test_an_encoder_of_which_one_part_still_reads_both_ways_is_refused_with_a_way_out():
    stateless, signature = converted(captured.bert(), {"*.0": Target("gru", causal=True), "*.1": "gru"})
    with pytest.raises(PassRefused, match=r"part 'part_1' needs the whole sequence .* with causal=True is one"):
        ThreadState(signature)(stateless)


def test_networks_without_a_state_or_without_time_are_refused():
    stateless, signature = converted(captured.bert(), "rnn")
    with pytest.raises(PassRefused, match=r"no part carries a state: .* Set causal=True"):
        ThreadState(signature)(stateless)
    image = captured.resnet()
    with pytest.raises(PassRefused, match="expected inputs with one dynamic time dimension, found none"):
        ThreadState(image.signature)(image.graph_module)


def test_a_graph_read_back_from_json_is_threaded_as_well():
    """It has no metadata: no shapes, no symbols."""
    stateless, signature = converted(captured.gpt2())
    again = fx.GraphModule(stateless, graph_json.load(graph_json.dump(stateless.graph))).eval()
    assert not any("val" in n.meta for n in again.graph.nodes)
    threaded = ThreadState(signature)(again).graph_module
    assert Counter(n.op for n in threaded.graph.nodes)["placeholder"] == 4
    assert_chunks_equal_whole(threaded, stateless, signature, ids())


class LooksAhead(nn.Module):
    """ids_BT -> logits_BTV: a recurrence, and behind it a convolution that reads `ahead` steps to either side."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.kernel = nn.Conv1d(8, 8, 3, padding=ahead, dilation=ahead)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.cell(self.table(input_ids))
        return self.head(x + self.kernel(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("ahead", [2, 16, 40])
def test_a_kernel_that_looks_far_ahead_is_seen(ahead):
    torch.manual_seed(0)
    guide = capture(LooksAhead(ahead).eval(), {"input_ids": torch.randint(0, 16, (3, 12))})
    hybrid = build_hybrid(make_plan(guide, {"cell": "gru"}, parts=["cell"])).graph_module.eval()
    with pytest.raises(PassRefused, match=r"kernel .*mixes time outside of the converted parts"):
        ThreadState(guide.signature)(hybrid)


def example() -> Example:
    """Without states given, a threaded graph can't be called: chunks are compared above."""
    stateless, signature = converted(captured.gpt2())
    return Example(ThreadState(signature), stateless, tuple(ids().values()), same_outputs=False)


class Meeting(nn.Module):
    """Sums the steps that a mask of pairs lets each step see."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.map(mask[:, 0] @ x)


def test_a_mask_of_pairs_comes_in_no_chunks():
    found = capture(Meeting().eval(), (torch.randn(3, 5, 4), torch.ones(3, 1, 5, 5).tril()))
    with pytest.raises(PassRefused, match="input 'mask' is of pairs of steps, so it can't come in chunks"):
        ThreadState(found.signature)(found.graph_module)
