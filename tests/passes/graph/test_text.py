from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from thesean.passes.graph.surgery import live_nodes
from thesean.passes.graph.text import text

aten = torch.ops.aten


def small() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("layer.weight")
    cell = graph.call_module("cell", (x, (weight, None)))
    item = graph.call_function(getitem, (cell, 0))
    graph.call_function(aten.exp.default, (x,))
    graph.call_function(aten.add_.Tensor, (x, 1))
    total = graph.call_function(aten.sum.dim_IntList, (item, [1]), {"dtype": torch.float32})
    graph.output({"sum": total})
    return graph


def test_every_kind_of_node_is_one_readable_line():
    assert text(small()) == [
        "x = placeholder x",
        "layer_weight = get_attr layer.weight",
        "cell = cell(x, (layer_weight, None))",
        "getitem = getitem(cell, 0)",
        "exp_default = aten.exp.default(x)",
        "add__tensor = aten.add_.Tensor(x, 1)",
        "sum_dim_int_list = aten.sum.dim_IntList(getitem, [1], dtype=torch.float32)",
        "return {'sum': sum_dim_int_list}",
    ]


def test_what_nothing_reads_can_be_left_out_but_not_what_writes():
    graph = small()
    left_out = set(text(graph)) - set(text(graph, live_nodes(graph)))
    assert left_out == {"exp_default = aten.exp.default(x)"}
