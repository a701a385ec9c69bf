"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch

from tests import captured
from tests.captured import KERNELS
from thesean.passes.analyse.dataflow import SOURCE, side_slice


def floating(node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("attention", KERNELS)
def test_masks_and_positions_of_gpt2_are_on_the_side_and_hidden_states_are_not(attention):
    graph = captured.gpt2(attention=attention).graph_module.graph
    side = side_slice(graph)
    embeddings = [n for n in graph.nodes if n.target is torch.ops.aten.embedding.default]
    ids, positions = embeddings
    assert ids not in side  # a hidden state: it reads the tokens
    assert positions in side  # no token's value flows in
    masks = [n for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) and not floating(n)]
    assert masks
    assert set(masks) <= side
    hidden = [n for n in graph.nodes if floating(n) and n.op == "call_function" and n.name.startswith("layer_norm")]
    assert len(hidden) == 5
    assert not side & set(hidden)


def test_parameters_and_integer_inputs_are_on_the_side():
    graph = captured.bert().graph_module.graph
    side = side_slice(graph)
    assert set(graph.find_nodes(op="get_attr")) <= side
    assert set(graph.find_nodes(op="placeholder")) <= side


def test_an_additive_mask_made_of_an_integer_mask_is_on_the_side():
    graph = captured.bert(attention="eager").graph_module.graph
    side = side_slice(graph)
    added = [n for n in graph.nodes if n.target is torch.ops.aten.softmax.int]
    masks = [i for n in added for a in n.all_input_nodes for i in a.all_input_nodes if i in side]
    assert masks


def test_rotary_tables_are_on_the_side():
    graph = captured.llama().graph_module.graph
    side = side_slice(graph)
    tables = [n for n in graph.nodes if n.target in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)]
    assert len(tables) == 2
    assert set(tables) <= side


def test_floating_inputs_are_hidden_states():
    graph = captured.encoder().graph_module.graph
    side = side_slice(graph)
    (x,) = graph.find_nodes(op="placeholder")
    assert x not in side


def test_the_flow_holds_what_reaches_the_output_from_one_source():
    flow = captured.flow_of(captured.gpt2())
    assert [n for n in flow.dag if flow.dag.in_degree(n) == 0] == [SOURCE]
    assert [n for n in flow.dag if flow.dag.out_degree(n) == 0] == [flow.sink]
    assert not flow.side & set(flow.dag)


def test_the_residual_stream_of_gpt2_is_one_chain_from_the_embedding_to_the_logits():
    flow = captured.flow_of(captured.gpt2())
    chain = [next(n for n in flow.order if n in flow.dag)]
    while chain[-1] in flow.links:
        chain.append(flow.links[chain[-1]])
    assert chain[0].target is torch.ops.aten.embedding.default
    assert chain[-1] in flow.dag.predecessors(flow.sink)
    # the embedding sum, then attention and MLP of two blocks
    assert len([n for n in chain if n.target is torch.ops.aten.add.Tensor]) == 5
    norms = [n for n in chain if n.target is torch.ops.aten.layer_norm.default]
    assert len(norms) == 1  # only the final one: the others stand beside a residual path
