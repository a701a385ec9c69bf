from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.captured import traced
from tests.models import Calling, seeded, vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.graph.graph_json import dump, load
from thesean.passes.graph.text import text
from thesean.passes.write_out_operators import WriteOutOperators, histogram


@torch.library.custom_op("tests_written_out::twice_and_half", mutates_args=())
def twice_and_half(x: torch.Tensor, by: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x * by, x / by


@twice_and_half.register_fake
def _(x: torch.Tensor, by: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("tests_written_out::rounded", mutates_args=())
def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.round()


@rounded.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


rounded.register_autograd(lambda ctx, grad: grad)  # straight through: a gradient that its operators don't have


@torch.library.custom_op("tests_written_out::up_to_the_first", mutates_args=())
def up_to_the_first(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x[0, 0].item() > 0 else x.clone()


@up_to_the_first.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def both(x: torch.Tensor) -> torch.Tensor:
    more, less = twice_and_half(x, 2.0)
    return more - less


def test_the_graph_before_and_after():
    graph_module = traced(Calling(both), vectors(2, 3))
    assert text(graph_module.graph) == [
        "x = placeholder x",
        "twice_and_half = tests_written_out.twice_and_half.default(x, 2.0)",
        "getitem = getitem(twice_and_half, 0)",
        "getitem_1 = getitem(twice_and_half, 1)",
        "sub = aten.sub.Tensor(getitem, getitem_1)",
        "return (sub,)",
    ]
    assert text(WriteOutOperators()(graph_module).graph_module.graph) == [
        "x = placeholder x",
        "mul = aten.mul.Tensor(x, 2.0)",
        "div = aten.div.Tensor(x, 2.0)",
        "sub = aten.sub.Tensor(mul, div)",
        "return (sub,)",
    ]


@pytest.mark.parametrize(
    "function",
    [torch.exp, rounded, up_to_the_first, lambda x: torch.histc(x, 3), lambda x: x.bernoulli()],
    ids=["plain", "a gradient of its own", "goes by a value", "bounds of the values", "no form"],
)
def test_what_may_stay_must_stay_or_cant_be_told_from_sizes_is_left_alone(function):
    graph_module = traced(Calling(function), vectors(2, 3))
    assert WriteOutOperators()(graph_module).reason == "no operator is to be written out"


def uninitialised(x: torch.Tensor) -> torch.Tensor:
    order = x[:, 0].argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    held = x.new_empty(3, 4)
    held[:] = 2
    return x[back] + torch.empty(2, 3).fill_(1)[0] + held[0, :3]


def counted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.histc(x, bins=5, min=-1, max=1)[:3]


def made_of_others(x: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(x, x.roll(1, 0)) + torch.cosine_similarity(x, x.roll(1, 0), dim=-1)[:, None]
    weighed = torch.special.expit(torch.tensordot(x, torch.eye(3), 1)) * torch.sinc(x)
    return weighed * (distances.mean() + torch.vdot(x[0], x[0]) + torch.trace(x[:3].T @ x[:3]) + x.amax() + x.amin())


def cells(x: torch.Tensor) -> torch.Tensor:
    """What nn.LSTMCell, nn.GRUCell and nn.RNNCell call, one after another."""
    given = [torch.linspace(-1, 1, rows * 3).view(rows, 3) for rows in (12, 9, 3)]
    hidden, memory = torch.lstm_cell(x, [x.sin(), x.cos()], given[0], given[0].roll(1, 0), given[0][:, 0])
    hidden = torch.gru_cell(hidden, memory, given[1], given[1].roll(1, 0), given[1][:, 0], given[1][:, 1])
    plain = torch.rnn_relu_cell(x, hidden, given[2], given[2].mT, given[2][0], given[2][1])
    return torch.rnn_tanh_cell(hidden, plain, given[2], given[2].mT)


@pytest.mark.parametrize("function", [both, uninitialised, counted, made_of_others, cells])
def test_what_is_written_out_can_be_saved_and_holds_at_other_sizes(function):
    found = capture(Calling(function), vectors(4, 3))
    graph = load(dump(found.graph_module.graph))
    for batch in (1, 7):
        x = vectors(batch, 3, seed=batch)
        close = 1e-5 if function in (made_of_others, cells) else 0  # sums in another order
        torch.testing.assert_close(found.graph_module(x), function(x), rtol=close, atol=close)
    assert len(graph.nodes) == len(found.graph_module.graph.nodes)


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_by_an_operator_of_transformers_own_can_be_saved_and_hold_at_other_sizes(experts):
    """Rows sorted by expert, counted by histc, multiplied by `grouped_mm`, and sorted back."""
    moe = pytest.importorskip("transformers.integrations.moe")

    def mixture(x: torch.Tensor) -> torch.Tensor:
        expert, order = x[:, 0].abs().mul(2).long().clamp(max=experts - 1).sort()
        counts = torch.histc(expert.float(), bins=experts, min=0, max=max(experts - 1, 1))
        weight = torch.arange(experts * 16.0).view(experts, 4, 4)  # torch takes widths of whole 16 bytes
        y = moe._grouped_mm(x[order], weight, counts.cumsum(0, dtype=torch.int32))
        return y[order.argsort()]

    found = capture(Calling(mixture), vectors(8, 4))
    assert not [n for n in found.graph_module.graph.nodes if "grouped_mm" in str(n.target)]
    load(dump(found.graph_module.graph))
    for batch in (1, 2, 23):
        x = vectors(batch, 4, seed=batch)
        torch.testing.assert_close(found.graph_module(x), mixture(x))


def test_a_histogram_is_torchs():
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([-1.0, 1.0, 0.5, 2.0])])
    for bins, least, most in ((1, -1, 1), (4, -1, 1), (7, 0, 3), (100, -2.5, 0.5)):
        assert histogram(x, bins, least, most).tolist() == torch.histc(x, bins, least, most).tolist()


def example() -> Example:
    return Example(WriteOutOperators(), traced(Calling(both), vectors(2, 3)), (vectors(2, 3, seed=1),))


class Bags(nn.Module):
    """Rows of ids, or ids in a row and where bags begin."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(20, 6, **settings), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.bag(ids, offsets))


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(1, 20, shape, generator=torch.Generator().manual_seed(seed))
    ids.flatten()[:4] = torch.tensor([3, 3, 5, 3])  # more than once, and a bag of padding alone
    return ids


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3, -17])
def test_bags_of_embeddings_can_be_saved_and_are_torchs_at_other_sizes(mode, padding):
    guide = seeded(Bags, mode=mode, padding_idx=padding)
    for example, other in (
        ((ids_of(4, 2),), (ids_of(7, 3, seed=1),)),
        ((ids_of(12), torch.tensor([0, 2, 4, 4])), (ids_of(9, seed=1), torch.tensor([0, 2, 2, 5, 9]))),
    ):
        inputs = dict(zip(("ids", "offsets"), example, strict=False))
        graph_module = capture(guide, inputs).graph_module
        assert len(load(dump(graph_module.graph)).nodes) == len(graph_module.graph.nodes)
        torch.testing.assert_close(graph_module(*other), guide(*other))


@pytest.mark.parametrize("last", [False, True])
def test_rows_of_a_bag_count_as_they_are_told(last):
    guide = seeded(Bags, mode="sum", include_last_offset=last)
    offsets = torch.tensor([0, 2, 2, 12])
    shares = torch.linspace(0.1, 2.0, 12)
    weigh = Calling(lambda weight: F.embedding_bag(
        ids_of(12), weight, offsets, mode="sum", per_sample_weights=shares, include_last_offset=last
    ))  # fmt: skip
    graph_module = WriteOutOperators()(traced(weigh, guide.bag.weight.detach())).graph_module
    assert not any("embedding_bag" in str(n.target) for n in graph_module.graph.nodes)
    torch.testing.assert_close(graph_module(guide.bag.weight), weigh(guide.bag.weight))
