"""Complex numbers moved about as pairs are those that torch moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.captured import traced
from tests.models import Calling, vectors
from thesean.passes.graph import complex_pairs
from thesean.passes.graph.complex_pairs import pairs_form
from thesean.passes.write_out_for_onnx import WriteOutForOnnx

aten = torch.ops.aten
IDS = torch.tensor([2, 0, 1])

# of z (3, 4, 6)
MOVES: dict[Any, Callable[[torch.Tensor], Any]] = {
    aten.unsqueeze.default: lambda z: z.unsqueeze(-1) * z.unsqueeze(-2).unsqueeze(1)[:, 0],
    aten.squeeze.dims: lambda z: z[:1].unsqueeze(-1).squeeze((0, -1)),
    aten.select.int: lambda z: z[:, -1] + z.select(-2, 0),
    aten.narrow.default: lambda z: z.narrow(-1, 1, 3),
    aten.index_select.default: lambda z: z.index_select(-3, IDS),
    aten.index.Tensor: lambda z: z[:, IDS],
    aten.embedding.default: lambda z: aten.embedding.default(z[0], IDS),
    aten.expand.default: lambda z: z[:, None].expand(3, 5, -1, 6),
    aten.reshape.default: lambda z: z.mT.reshape(3, -1),
    aten.view.default: lambda z: z.view(12, 6),
    aten._unsafe_view.default: lambda z: aten._unsafe_view.default(z, [2, 36]),
    aten.flatten.using_ints: lambda z: z.flatten(-2) + z.flatten(1),
    aten.unflatten.int: lambda z: z.unflatten(-1, (2, -1)),
    aten.movedim.int: lambda z: z.movedim(-1, 0),
    aten.repeat.default: lambda z: z.repeat(2, 1, 1, 2),
    aten.repeat_interleave.self_int: lambda z: z.repeat_interleave(2, -1),
    aten.cumsum.default: lambda z: z.cumsum(-1),
    aten.constant_pad_nd.default: lambda z: torch.constant_pad_nd(z, [1, 2, 0, 1]),
    aten.contiguous.default: lambda z: z.mT.contiguous(),
    aten.split.Tensor: lambda z: z.split(4, -1),
    aten.split_with_sizes.default: lambda z: z.split_with_sizes([1, 5], -1),
    aten.chunk.default: lambda z: z.chunk(2, -2),
    aten.unbind.int: lambda z: z.unbind(-1),
    aten.exp.default: lambda z: z.exp(),
}


def test_each_form_has_a_case() -> None:
    assert set(MOVES) == set(complex_pairs._PAIRS)


@pytest.mark.parametrize("target", MOVES, ids=str)
def test_pairs_are_moved_as_complex_numbers_are(target: Any) -> None:
    def moved(x: torch.Tensor) -> Any:
        found = MOVES[target](torch.view_as_complex(x.unflatten(-1, (-1, 2))))
        return pytree.tree_map(torch.view_as_real, found)

    graph_module = traced(Calling(moved), vectors(3, 4, 12))
    assert any(n.target is target and pairs_form(n) for n in graph_module.graph.nodes)
    x = vectors(3, 4, 12, seed=1)
    want = graph_module(x)
    written = WriteOutForOnnx()(graph_module).graph_module
    assert not any(pairs_form(n) for n in written.graph.nodes)
    torch.testing.assert_close(written(x), want)


def test_of_real_numbers_nothing_is_moved() -> None:
    graph_module = traced(Calling(lambda x: x.unsqueeze(-1)), vectors(2, 3))
    assert not any(pairs_form(n) for n in graph_module.graph.nodes)
    assert not WriteOutForOnnx()(graph_module).modified
