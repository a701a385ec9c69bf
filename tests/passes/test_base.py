"""What every pass keeps to, seen on passes that don't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from tests.models import vectors
from thesean.errors import PassBroken, PassRefused
from thesean.passes.base import Attempt, Pass, PassResult, run_passes
from thesean.passes.graph.text import text

aten = torch.ops.aten


@dataclass(frozen=True)
class ReluToTanh(Pass):
    """relu(x)  =>  tanh(x)."""

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)
        for node in found:
            node.target = aten.tanh.default
        reason = "" if found else "the graph has no relu"
        return PassResult(graph_module=graph_module, modified=bool(found), reason=reason)


@dataclass(frozen=True)
class CopiedReluToTanh(Pass):
    """relu(x)  =>  tanh(x), in a copy."""

    in_place = False

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return ReluToTanh().call(copy.deepcopy(graph_module))


@dataclass(frozen=True)
class RefuseTanh(Pass):
    """x  =>  x, where nothing is a tanh."""

    in_place = True

    def requires(self, graph_module: fx.GraphModule) -> None:
        if any(n.target is aten.tanh.default for n in graph_module.graph.nodes):
            raise PassRefused("refuse tanh: expected none, found one.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module=graph_module, modified=False, reason="there is nothing to do")


@pytest.fixture
def relu() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node("call_function", aten.relu.default, (x,), name="relu"))
    return fx.GraphModule(nn.Module(), graph)


def test_a_pass_is_named_after_its_class_or_names_itself():
    @dataclass(frozen=True)
    class FoldBatchNorm2d(ReluToTanh):
        pass

    @dataclass(frozen=True)
    class Odd(ReluToTanh):
        name = "even"

    assert (ReluToTanh.name, FoldBatchNorm2d.name, Odd.name) == ("relu-to-tanh", "fold-batch-norm2d", "even")


def test_a_pass_that_does_not_say_whether_it_works_in_place_is_no_pass():
    with pytest.raises(TypeError, match=r"Silent: expected in_place = True or False in the class, found neither"):

        class Silent(Pass):
            def call(self, graph_module: fx.GraphModule) -> PassResult:
                return PassResult(graph_module=graph_module, modified=False)


def test_a_pass_that_does_nothing_can_not_be_made():
    class Idle(Pass):
        in_place = True

    with pytest.raises(TypeError, match="abstract"):
        Idle()  # type: ignore[abstract]


def renamed(graph_module: fx.GraphModule) -> fx.GraphModule:
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
        node.target = aten.tanh.default
    return graph_module


Rewrite = Callable[[fx.GraphModule], PassResult]

BROKEN: dict[str, tuple[bool, Rewrite, str]] = {
    "in place, and hands back a copy": (
        True,
        lambda g: PassResult(graph_module=copy.deepcopy(g), modified=True),
        "in_place = True to hand back the module that came in",
    ),
    "not in place, and hands back what came": (
        False,
        lambda g: PassResult(graph_module=g, modified=True),
        "in_place = False to hand back another module",
    ),
    "not in place, and changes what came": (
        False,
        lambda g: PassResult(graph_module=copy.deepcopy(renamed(g)), modified=True),
        "in_place = False to leave the graph that came in as it was",
    ),
    "unmodified, and changes what came": (
        True,
        lambda g: PassResult(graph_module=renamed(g), modified=False, reason="none"),
        "an unmodified graph to be the one that came in",
    ),
    "unmodified, and hands back a copy": (
        False,
        lambda g: PassResult(graph_module=copy.deepcopy(g), modified=False, reason="none"),
        "an unmodified graph to be the one that came in",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_pass_that_does_not_keep_its_word_is_found_out(relu, case):
    said, rewrite, promise = BROKEN[case]

    @dataclass(frozen=True)
    class Broken(Pass):
        in_place = said

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            return rewrite(graph_module)

    with pytest.raises(PassBroken, match=f"broken: expected {promise}"):
        Broken()(relu)


def test_a_refusal_that_comes_too_late_is_found_out(relu):
    @dataclass(frozen=True)
    class Late(Pass):
        in_place = True

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            renamed(graph_module)
            raise PassRefused("too late")

    with pytest.raises(PassBroken, match="a refusal that leaves the graph as it was"):
        Late()(relu)


def test_passes_run_in_order_and_each_leaves_a_note(relu):
    graph_module, notes = run_passes(relu, RefuseTanh(), ReluToTanh(), ReluToTanh(), Attempt(RefuseTanh()))
    assert graph_module is relu
    assert text(graph_module.graph) == ["x = placeholder x", "relu = aten.tanh.default(x)", "return relu"]
    assert torch.equal(graph_module(vectors(2, 3)), torch.tanh(vectors(2, 3)))
    assert [(n.name, n.outcome, n.reason) for n in notes] == [
        ("refuse-tanh", "unchanged", "there is nothing to do"),
        ("relu-to-tanh", "modified", ""),
        ("relu-to-tanh", "unchanged", "the graph has no relu"),
        ("refuse-tanh", "refused", "refuse tanh: expected none, found one."),
    ]


def test_of_passes_that_are_attempted_together_all_are_taken_back_where_one_refuses(relu):
    before = text(relu.graph)
    graph_module, notes = run_passes(relu, Attempt(CopiedReluToTanh(), RefuseTanh()))
    assert graph_module is relu
    assert text(graph_module.graph) == before
    assert [(n.name, n.outcome) for n in notes] == [("refuse-tanh", "refused")]
    graph_module, notes = run_passes(relu, Attempt(CopiedReluToTanh(), ReluToTanh()))
    assert torch.equal(graph_module(vectors(2, 3)), torch.tanh(vectors(2, 3)))
    assert [n.outcome for n in notes] == ["modified", "unchanged"]


def test_a_refusal_ends_the_run_unless_the_pass_was_an_attempt(relu):
    with pytest.raises(PassRefused, match="refuse tanh: expected none"):
        run_passes(relu, ReluToTanh(), RefuseTanh())


def test_a_pass_whose_graph_reads_a_value_before_it_is_made_is_told():
    @dataclass(frozen=True)
    class Disorder(Pass):
        in_place = True

        def call(self, graph_module: fx.GraphModule) -> PassResult:
            made = next(n for n in graph_module.graph.nodes if n.op == "call_function")
            graph_module.graph.output_node().append(made)
            return PassResult(graph_module=graph_module, modified=True)

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node("call_function", aten.relu.default, (x,), name="relu"))
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        Disorder()(fx.GraphModule(nn.Module(), graph))
