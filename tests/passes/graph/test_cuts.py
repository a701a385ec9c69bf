"""B batch, D width"""

from __future__ import annotations

import torch
from torch import fx, nn

from tests.live import Kept
from tests.models import vectors
from thesean.passes.graph.cuts import find_cuts

WIDTH, ROWS = 16, 32
VECTORS = 4 * WIDTH * ROWS  # bytes of one x_BD


class Block(nn.Module):
    """x + down(gelu(up(x))): 4 D are kept twice, and x."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def deep(blocks: int = 8) -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(nn.Sequential(*(Block() for _ in range(blocks))))


def inputs() -> dict[str, torch.Tensor]:
    return {"input": vectors(ROWS, WIDTH)}


def test_without_cuts_a_backward_keeps_what_autograd_says():
    network, given = deep(), inputs()
    with Kept([*network.parameters(), *given.values()]) as kept:
        network(**given)
    # each block but the first keeps its x, which the first is given
    assert find_cuts(network, given).without == kept.bytes == (8 * 8 + 7) * VECTORS


def test_cuts_stand_where_one_stream_crosses_and_as_many_as_pay():
    found = find_cuts(deep(), inputs())
    names = [n.name for n in deep().graph.nodes]
    assert names.index(found.after[0]) == 0
    assert list(found.after[1:]) == [name for name in names if "add" in name][:-1]
    # of eight blocks: a region is one of them, whose 8 widths are kept; one crosses at each of the other ends
    assert found.held == (8 + 7) * VECTORS


def test_what_no_gradient_flows_through_is_left_as_it_is():
    network = deep()
    trained = [m for m in network.modules() if isinstance(m, nn.Linear)][8:]
    network.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    found = find_cuts(network, inputs())
    assert found.after[0] == [n.name for n in network.graph.nodes if "add" in n.name][3]  # where the fifth block begins
    assert found.held < 0.6 * found.without


def test_one_layer_is_not_cut():
    network = deep(1)
    found = find_cuts(network, inputs())
    assert found.after == ()
    assert found.held == found.without
