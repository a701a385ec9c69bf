from __future__ import annotations

import torch
from torch import nn

from tests import captured
from tests.captured import traced
from tests.models import seeded, vectors
from tests.passes.contract import Example
from tests.remembering_guides import WIDTH, LatentAttention
from thesean.passes.graph.nodes import leaf_values
from thesean.passes.graph.text import text
from thesean.passes.latents_side_by_side import LatentsSideBySide


def attention() -> nn.Module:
    return seeded(LatentAttention, turned="", of_queries=True)


def example() -> Example:
    x = vectors(2, 5, WIDTH)
    return Example(LatentsSideBySide(), traced(attention(), x), [x])


def test_queries_keys_and_values_read_slices_of_one_value():
    graph_module = example().graph_module
    result = LatentsSideBySide()(graph_module)
    lines = text(result.graph_module.graph)
    assert [line for line in lines if "cat_default" in line] == [
        "cat_default = aten.cat.default([layer_norm, getitem_3, layer_norm_1], -1)",
        "slice_tensor = aten.slice.Tensor(cat_default, -1, 0, 7)",
        "slice_tensor_1 = aten.slice.Tensor(cat_default, -1, 7, 11)",
        "slice_tensor_2 = aten.slice.Tensor(cat_default, -1, 11, 16)",
    ]
    assert sum("(layer_norm" in line for line in lines) == 0
    assert not any("cat_default" in line for line in text(graph_module.graph))  # it stayed as it was


def test_an_attention_that_reads_one_value_is_left_alone():
    result = LatentsSideBySide()(captured.gpt2().graph_module)
    assert (result.modified, result.reason) == (False, "no attention reads a latent beside something else")


def test_keys_that_layers_share_are_joined_once():
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x) + self.attention(x)

    x = vectors(2, 5, WIDTH)
    graph_module = traced(Sharing().eval(), x)
    result = LatentsSideBySide()(graph_module)
    found, wanted = (leaf_values(made(x)) for made in (result.graph_module, graph_module))
    torch.testing.assert_close(found, wanted)
