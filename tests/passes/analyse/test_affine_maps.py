"""M rows, I inputs, O outputs"""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from tests.captured import traced
from tests.models import vectors
from thesean.passes.analyse.affine_maps import is_affine, probe_rows, read_affine, run_rows
from thesean.passes.graph.record import record


def region_of(module: nn.Module, *shape: int) -> tuple[list[fx.Node], dict[fx.Node, torch.Tensor], fx.Node, fx.Node]:
    """Nodes, recorded values, entry and exit of a whole small graph."""
    graph_module = traced(module, vectors(*shape))
    values = record(graph_module, {"x": vectors(*shape)})
    (entry,) = graph_module.graph.find_nodes(op="placeholder")
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function" and isinstance(values[n], torch.Tensor)]
    return nodes, values, entry, nodes[-1]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (50, 4)])
def test_rows_run_as_tokens_whatever_the_recordings_size(shape):
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    nodes, values, entry, end = region_of(module, *shape)
    x = vectors(20, 4, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(run_rows(nodes, values, {entry: x})[end], module(x))


def test_values_without_a_row_a_token_are_left_out():
    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(1).unsqueeze(1)

    nodes, values, entry, end = region_of(Pool(), 2, 3, 4)
    found = run_rows(nodes, values, {entry: vectors(6, 4)})
    assert end in found
    assert {n.target for n in nodes if n not in found} >= {torch.ops.aten.mean.dim}


@pytest.mark.parametrize(
    ("function", "affine"),
    [
        (lambda x: 3 * x + 1, True),
        (lambda x: x.flip(-1) - 2, True),
        (torch.zeros_like, True),
        (torch.relu, False),
        (lambda x: x.clamp(-6, 6), False),
        (torch.tanh, False),
        (lambda x: x + 1e-3 * x.square(), False),
        (lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(1), False),
    ],
)
def test_affine_maps_are_told_from_others(function, affine):
    assert is_affine(function(probe_rows(3 * vectors(4, 6)))) == affine


def read(module: nn.Module, width: int = 4):
    nodes, values, entry, end = region_of(module, 2, 3, width)
    x = probe_rows(values[entry])
    return read_affine(nodes, values, entry, end, x, run_rows(nodes, values, {entry: x})[end])


def test_a_weight_of_the_graph_is_shared():
    linear = nn.Linear(4, 5)
    affine = read(linear)
    assert affine is not None
    assert affine.weight_OI.data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(affine.bias_O, linear.bias)


def test_a_square_weight_is_not_taken_for_its_transpose():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(vectors(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    affine = read(Transposed())
    assert affine is not None
    assert torch.equal(affine.weight_OI, vectors(4, 4).T)


def test_a_map_without_a_weight_of_its_own_is_probed():
    class Permuted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x.flip(-1) + 1

    affine = read(Permuted(), width=9)
    assert affine is not None
    torch.testing.assert_close(affine.weight_OI, 2 * torch.eye(9).flip(0))
    torch.testing.assert_close(affine.bias_O, torch.ones(9))


def test_a_map_that_mixes_tokens_is_none():
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    assert read(Mixed()) is None
    assert read(nn.Sequential(nn.Linear(4, 5), nn.ReLU())) is None
