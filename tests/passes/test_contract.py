"""The contract on every pass that there is, by the example of its own test, and on passes that break it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tests.captured import traced
from tests.models import vectors
from tests.passes.contract import Example, check_pass
from thesean.passes.base import Pass, PassResult

(FOLDER,) = importlib.import_module("thesean.passes").__path__
FILES = sorted({path.stem for path in Path(FOLDER).glob("*.py")} - {"base"})


@pytest.mark.parametrize("name", FILES)
def test_a_pass_keeps_its_promises_on_the_example_of_its_test(name):
    module = importlib.import_module(f"tests.passes.test_{name}")
    assert hasattr(module, "example"), f"tests/passes/test_{name}.py: define example() -> tests.passes.contract.Example"
    example: Example = module.example()
    assert type(example.a_pass).__module__ == f"thesean.passes.{name}"
    check_pass(
        example.a_pass,
        example.graph_module,
        example.inputs,
        same_outputs=example.same_outputs,
        applies_everywhere=example.applies_everywhere,
    )


@dataclass(frozen=True)
class Rename(Pass):
    """relu(x) => sigmoid(x): what a subclass breaks."""

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        found = [n for n in graph_module.graph.nodes if n.target is torch.ops.aten.tanh.default]
        if not found:
            return PassResult(graph_module=graph_module, modified=False, reason="there is no tanh")
        for node in found:
            node.target = torch.ops.aten.tan.default
        return PassResult(graph_module=graph_module, modified=True)


@dataclass(frozen=True)
class Copying(Rename):
    """tanh(x) => tanh(x), in a copy; it says that it works in place."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        result = super().call(graph_module)
        if not result.modified:
            return result
        return PassResult(graph_module=fx.GraphModule(graph_module, graph_module.graph), modified=True)


@dataclass(frozen=True)
class Greedy(Rename):
    """x => x, always."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module=graph_module, modified=True)


@dataclass(frozen=True)
class Silent(Rename):
    """x => x, never."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module=graph_module, modified=False)


@dataclass(frozen=True)
class Undocumented(Rename):
    pass


class Thawed(Rename):
    """tanh(x) => tan(x), and no dataclass of its own."""


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (Rename, "the outputs differ by"),
        (Greedy, "a relu alone is modified"),
        (Silent, "needs a reason"),
        (Undocumented, "expected a docstring"),
        (Thawed, r"expected @dataclass\(frozen=True\)"),
    ],
)
def test_what_a_pass_breaks_is_found(broken, found):
    x = vectors(2, 3)
    with pytest.raises(AssertionError, match=found):
        check_pass(broken(), traced(nn.Tanh(), x), (x,))


def test_a_pass_that_says_wrongly_that_it_works_in_place_is_found():
    x = vectors(2, 3)
    with pytest.raises(Exception, match=r"in[ _]place"):
        check_pass(Copying(), traced(nn.Tanh(), x), (x,), same_outputs=False)


def test_a_pass_of_ones_own_passes():
    x = vectors(2, 3)
    result = check_pass(Rename(), traced(nn.Tanh(), x), (x,), same_outputs=False)
    assert result.modified
