from __future__ import annotations

import pytest
import torch
from torch import fx

from tests import captured
from tests.models import tokens
from thesean.passes.graph import along as walking
from thesean.passes.graph.along import Along
from thesean.passes.graph.record import record


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[fx.Node]:
    """The nodes that were run, in order."""
    nodes: list[fx.Node] = []
    before = walking.value_of

    def counted(graph_module, node, env, inputs):
        nodes.append(node)
        return before(graph_module, node, env, inputs)

    monkeypatch.setattr(walking, "value_of", counted)
    return nodes


def test_each_node_is_run_once_and_only_what_is_read_later_is_held(ran):
    guide = captured.gpt2().graph_module
    inputs = {"input_ids": tokens(2, 9)}
    along, expected = Along(guide, inputs), record(guide, inputs)
    sums = [n for n in guide.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    for node in sums:
        assert torch.equal(along.get(node), expected[node])
        assert torch.equal(along.get(node), expected[node])
        assert set(along._env) <= {node, *(n for n in expected if set(n.users) - set(ran))}
    assert len(ran) == len(set(ran))


def test_what_lies_behind_is_run_again_and_what_is_kept_is_not(ran):
    guide = captured.gpt2().graph_module
    sums = [n for n in guide.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    along, expected = Along(guide, {"input_ids": tokens(2, 9)}, [sums[0]]), record(guide, {"input_ids": tokens(2, 9)})
    along.get(sums[-1])
    ran.clear()
    assert torch.equal(along.get(sums[0]), expected[sums[0]])
    assert ran == []
    assert torch.equal(along.get(sums[1]), expected[sums[1]])
    assert sums[1] in ran
