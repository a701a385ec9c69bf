"""Causal convolutions and shifts with the steps that they look back at as state."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from tests import captured, models
from tests.looking_back import AHEAD, CONVOLUTIONS, OTHERS, SHIFTS, WIDTH, WINDOWS, LooksBack, looking_back
from tests.passes.contract import Example
from tests.passes.test_delay_steps import assert_a_late_stream
from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import join, run_in_chunks
from thesean.passes.cache_attention import CacheAttention
from thesean.passes.cache_steps import CacheSteps
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.last_steps import LastSteps
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.thread_state import ThreadState, zero_states
from thesean.targets import Target

CHUNKED = ((1,) * 12, (1, 5, 1, 5), (12,))


def threaded(guide: Captured) -> fx.GraphModule:
    cached = CacheAttention(guide.signature)(guide.graph_module).graph_module
    return ThreadState(guide.signature)(CacheSteps(guide.signature)(cached).graph_module).graph_module


@torch.no_grad()
def assert_chunks_equal_whole(stateful: fx.GraphModule, guide: Captured, inputs: dict[str, torch.Tensor]) -> None:
    batch = next(iter(inputs.values())).shape[0]
    whole = leaf_values(guide.graph_module(**inputs))[0]
    for chunks in CHUNKED:
        pieces, _ = run_in_chunks(stateful, guide.signature, inputs, zero_states(stateful, batch), chunks)
        torch.testing.assert_close(join([p[0] for p in pieces], whole.shape), whole, rtol=1e-4, atol=1e-5)


def test_the_graph_before_and_after():
    guide = looking_back("trimmed")
    before = text(guide.graph_module.graph)
    after = text(CacheSteps(guide.signature)(guide.graph_module).graph_module.graph)
    assert text(guide.graph_module.graph) == before
    assert before[-7:-1] == [
        "transpose_2 = aten.transpose.int(tanh, 1, 2)",
        "conv1d_1 = aten.conv1d.default(transpose_2, wide_weight, wide_bias, [1], [4], [4])",
        "slice_2 = aten.slice.Tensor(conv1d_1, 2, 0, -4)",
        "transpose_3 = aten.transpose.int(slice_2, 1, 2)",
        "add_1 = aten.add.Tensor(tanh, transpose_3)",
        "linear_1 = aten.linear.default(add_1, last_weight, last_bias)",
    ]
    assert after[-8:-1] == [
        "transpose_2 = aten.transpose.int(tanh, 1, 2)",
        "steps_1 = steps_1(transpose_2)",
        "getitem = getitem(steps_1, 0)",
        "conv1d_1 = aten.conv1d.default(getitem, wide_weight, wide_bias, [1], [0], [4], 1)",
        "transpose_3 = aten.transpose.int(conv1d_1, 1, 2)",
        "add_1 = aten.add.Tensor(tanh, transpose_3)",
        "linear_1 = aten.linear.default(add_1, last_weight, last_bias)",
    ]


@pytest.mark.parametrize("spelling", [*CONVOLUTIONS, *WINDOWS, *SHIFTS])
def test_chunks_equal_the_whole_however_it_is_written(spelling):
    guide = looking_back(spelling)
    stateful = threaded(guide)
    assert stateful.meta["rows_are_alone"]
    assert_chunks_equal_whole(stateful, guide, {"x": models.vectors(2, 12, WIDTH)})


@pytest.mark.parametrize(("spelling", "shape"), [("trimmed", ("batch", WIDTH, 4)), ("written", ("batch", 1, WIDTH))])
def test_a_state_is_no_more_than_the_steps_that_are_looked_back_at(spelling, shape):
    assert [s.shape for s in threaded(looking_back(spelling)).meta["states"]] == [shape] * 2


class Shared(nn.Module):
    """Two convolutions and a shift of one sequence, that look back as far."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 2, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_BDT = x.transpose(1, 2)
        return sum(conv(x_BDT)[..., :-1] for conv in self.convs) + nn.functional.pad(x_BDT, (1, -1))


def test_those_that_look_as_far_back_at_one_sequence_share_its_state():
    guide = capture(models.seeded(Shared).eval(), models.vectors(3, 11, WIDTH))
    stateful = threaded(guide)
    assert len(stateful.meta["states"]) == 1
    assert_chunks_equal_whole(stateful, guide, {"x": models.vectors(2, 12, WIDTH)})


class Bigrams(nn.Module):
    """Ids beside the ids before them, which may be zeros themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.out = nn.Embedding(25, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.pairs(5 * ids + nn.functional.pad(ids[:, :-1], (1, 0))))


def test_ids_of_the_step_before_are_remembered_as_ids():
    guide = capture(models.seeded(Bigrams).eval(), torch.randint(0, 5, (3, 11)))
    stateful = threaded(guide)
    assert [(s.dtype, s.shape) for s in stateful.meta["states"]] == [(torch.int64, ("batch", 1))]
    assert_chunks_equal_whole(stateful, guide, {"ids": torch.randint(0, 5, (2, 12))})


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("spelling", [*OTHERS, *AHEAD])
def test_what_no_steps_stand_for_stays(spelling):
    guide = looking_back(spelling)
    result = CacheSteps(guide.signature)(guide.graph_module)
    assert result.reason == "nothing puts zeros in front of a sequence"
    with pytest.raises(PassRefused, match="thread state"):
        ThreadState(guide.signature)(guide.graph_module)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(("spelling", "steps"), AHEAD.items())
def test_what_looks_ahead_is_a_stream_that_is_late_where_that_is_asked_for(spelling, steps):
    guide = looking_back(spelling)
    cached = CacheSteps(guide.signature, ahead=True)(guide.graph_module).graph_module
    x = models.vectors(3, 11, WIDTH)
    torch.testing.assert_close(cached(x=x), guide.graph_module(x=x))
    assert_a_late_stream(cached, guide.signature, {"x": x}, 2 * steps)


def test_a_convolution_that_is_kept_comes_late_beside_a_part_that_looks_ahead():
    class Both(LooksBack):
        def __init__(self) -> None:
            super().__init__("symmetric")
            self.cell = nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.symmetric(self.cell(self.symmetric(x))[0])

    guide = capture(models.seeded(Both), models.vectors(3, 11, WIDTH))
    torch.manual_seed(0)
    hybrid = build_hybrid(make_plan(guide, {"cell": Target("gru", lookahead=3)}, parts=["cell"])).graph_module.eval()
    cached = CacheSteps(guide.signature)(hybrid).graph_module
    assert_a_late_stream(cached, guide.signature, {"x": models.vectors(3, 11, WIDTH)}, 1 + 3 + 1)


def test_what_has_no_time_is_left_alone():
    image = captured.resnet()
    assert CacheSteps(image.signature)(image.graph_module).reason == "there is no single dimension of time"


def test_steps_that_hold_nothing_are_remembered_as_zeros():
    x, mask = models.vectors(2, 5, WIDTH), torch.tensor([[True] * 5, [False, False, True, True, True]])
    whole, after = LastSteps(3, 1)(x, mask=mask)
    assert torch.equal(whole[1, :5], torch.zeros(5, WIDTH))
    assert torch.equal(whole[:, 3 + 2 :], x[:, 2:])
    assert torch.equal(after, x[:, 2:])


def example() -> Example:
    guide = looking_back("planes")
    return Example(CacheSteps(guide.signature), guide.graph_module, (models.vectors(3, 9, WIDTH),))
