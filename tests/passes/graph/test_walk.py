from __future__ import annotations

import pytest
import torch
from torch import fx

from tests import captured
from tests.models import tokens, vectors
from thesean.passes.graph import walk as walking
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.shelf import Shelf
from thesean.passes.graph.walk import Walk


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The names of the nodes that were run, in order."""
    names: list[str] = []
    before = walking.value_of

    def counted(graph_module, node, env, inputs):
        names.append(node.name)
        return before(graph_module, node, env, inputs)

    monkeypatch.setattr(walking, "value_of", counted)
    return names


def residuals(graph_module: fx.GraphModule) -> list[str]:
    return [n.name for n in graph_module.graph.nodes if n.target is torch.ops.aten.add.Tensor]


@pytest.mark.parametrize("budget", [None, 0, 20_000])
def test_each_step_gives_what_running_the_prefix_again_gives(budget):
    guide = captured.gpt2().graph_module
    names = residuals(guide)
    batches = [{"input_ids": ids} for ids in (tokens(2, 5), tokens(3, 9, seed=1), tokens(1, 2))]
    walk = Walk(guide, [[n] for n in names], batches, budget)
    with torch.no_grad():
        for step, name in enumerate(names):
            prefix = intermediates(guide, [name], with_output=False)
            for number, inputs in enumerate(batches):
                assert torch.equal(walk.get(step, number)[name], prefix(**inputs)[name])


def test_a_node_is_run_once_a_batch_whatever_the_number_of_steps(ran):
    guide = captured.functional().graph_module
    names = residuals(guide)
    batches = [{"x": vectors(2, 8)}, {"x": vectors(3, 8)}]
    walk = Walk(guide, [[n] for n in names], batches)
    for step in range(len(names)):
        for number in range(2):
            walk.get(step, number)
    assert len(names) == 3
    assert all(ran.count(name) == 2 for name in ran)
    assert "output" not in ran


def test_without_room_every_step_begins_at_the_inputs(ran):
    guide = captured.functional().graph_module
    names = residuals(guide)
    walk = Walk(guide, [[n] for n in names], [{"x": vectors(2, 8)}], budget=0)
    for step in range(3):
        walk.get(step, 0)
    assert [ran.count(name) for name in names] == [3, 2, 1]


def test_what_nothing_later_reads_is_let_go():
    guide = captured.functional().graph_module
    names = residuals(guide)
    walk = Walk(guide, [[n] for n in names], [{"x": vectors(2, 8)}])
    for step, name in enumerate(names):
        assert list(walk.get(step, 0)) == [name]
        _, held = walk._held[0]
        assert {n.name for n in held} == ({name} if step < 2 else set())


def test_steps_may_be_left_out_and_a_value_asked_for_by_two():
    guide = captured.functional().graph_module
    first, second, third = residuals(guide)
    walk = Walk(guide, [[first], [second], [first, third, third]], [{"x": vectors(2, 8)}])
    found = walk.get(2, 0)
    wanted = intermediates(guide, [first, third], with_output=False)(x=vectors(2, 8))
    assert list(found) == [first, third]
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_step_may_be_asked_for_again(ran):
    guide = captured.functional().graph_module
    name = residuals(guide)[0]
    walk = Walk(guide, [[name]], [{"x": vectors(2, 8)}])
    assert torch.equal(walk.get(0, 0)[name], walk.get(0, 0)[name])
    assert ran.count(name) == 2


def test_a_value_that_is_put_in_is_not_computed(ran):
    guide = captured.functional().graph_module
    first, second, third = residuals(guide)
    walk = Walk(guide, [[first], [third]], [{"x": vectors(2, 8)}])
    assert not walk.has_run(second, 0)
    assert walk.has_run(second, 1)
    walk.get(0, 0)
    walk.put(second, 0, torch.zeros(2, 8))
    assert walk.get(1, 0)[third].abs().max() == 0
    assert second not in ran


def test_what_is_put_in_too_late_changes_nothing():
    guide = captured.functional().graph_module
    first, second, _ = residuals(guide)
    walk = Walk(guide, [[first], [second]], [{"x": vectors(2, 8)}])
    walk.put(first, 0, torch.zeros(2, 8))  # nothing is held yet
    walk.get(0, 0)
    walk.put(first, 0, torch.zeros(2, 8))  # it was run
    wanted = intermediates(guide, [second], with_output=False)(x=vectors(2, 8))[second]
    assert torch.equal(walk.get(1, 0)[second], wanted)


def test_a_module_that_changed_is_run_again_once_that_is_forgotten():
    graph = fx.Graph()
    call = graph.call_module("layer", (graph.placeholder("x"),))
    last = graph.call_function(torch.ops.aten.relu.default, (call,))
    graph.output(last)
    layer = torch.nn.Linear(8, 8)
    walk = Walk(fx.GraphModule({"layer": layer}, graph), [[call.name], [last.name]], [{"x": vectors(2, 8)}])
    with torch.no_grad():
        walk.get(0, 0)
        layer.weight.zero_()
        layer.bias.fill_(2.0)
        walk.forget()
        assert torch.equal(walk.get(1, 0)[last.name], torch.full((2, 8), 2.0))


def test_with_a_shelf_what_does_not_fit_is_read_from_disk_and_not_computed_again(ran):
    guide = captured.gpt2().graph_module
    names = residuals(guide)
    batches = [{"input_ids": ids} for ids in (tokens(2, 5), tokens(3, 9, seed=1))]
    with Shelf() as shelf, torch.no_grad():
        walk = Walk(guide, [[n] for n in names], batches, budget=0, shelf=shelf)
        for step, name in enumerate(names):
            prefix = intermediates(guide, [name], with_output=False)
            for number, inputs in enumerate(batches):
                assert torch.equal(walk.get(step, number)[name], prefix(**inputs)[name])
    assert all(ran.count(name) == 2 for name in ran)
