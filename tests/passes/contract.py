"""What holds for every pass: `check_pass(a_pass, graph_module, inputs)` runs it on one, in this folder or not.

The test of a pass, `test_<file>.py`, defines `example()`, a graph that the pass changes: `test_contract.py` finds it.
Each check raises AssertionError with the pass's class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.nodes import leaf_values


@dataclasses.dataclass(frozen=True)
class Example:
    """A pass, a graph that it changes, and inputs in order. `same_outputs`: the change is in how, not in what.
    `applies_everywhere`: there is no graph that it leaves alone, and so no reason to give.
    """

    a_pass: Pass
    graph_module: fx.GraphModule
    inputs: Sequence[torch.Tensor]
    same_outputs: bool = True
    applies_everywhere: bool = False


def relu() -> fx.GraphModule:
    """A graph that nearly every pass leaves alone: no weights, no positions, nothing to drop."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output((y,))
    x.meta["val"] = y.meta["val"] = torch.zeros(2, 3)
    return fx.GraphModule(nn.Module(), graph)


def expect(condition: bool, a_pass: Pass, found: str) -> None:
    # not `assert`: pytest explains asserts in tests alone, and this one names the pass
    if not condition:
        raise AssertionError(f"{type(a_pass).__name__}: {found}")


def nodes(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.format_node()) for node in graph_module.graph.nodes]


def check_it_is_a_frozen_dataclass_whose_docstring_is_the_equation(a_pass: Pass) -> None:
    kind: Any = type(a_pass)
    own = "__dataclass_params__" in vars(kind) and kind.__dataclass_params__.frozen
    expect(own, a_pass, "expected @dataclass(frozen=True)")
    doc = kind.__doc__ or ""
    # dataclass writes a signature where there is no docstring
    equation = "=>" in doc or "~" in doc
    expect(equation and not doc.startswith(f"{kind.__name__}("), a_pass, 'expected a docstring "before  =>  after"')


def check_a_graph_that_it_does_not_apply_to_is_left_alone_and_why(a_pass: Pass) -> None:
    graph_module = relu()
    before = nodes(graph_module)
    try:
        result = a_pass(graph_module)
    except PassRefused as refusal:
        expect(bool(str(refusal)), a_pass, "a refusal says nothing")
    else:
        expect(not result.modified, a_pass, "a relu alone is modified")
        expect(bool(result.reason), a_pass, "a graph that is left alone needs a reason")
        expect(result.graph_module is graph_module, a_pass, "what is left alone is the object that came in")
    expect(nodes(graph_module) == before, a_pass, "a graph that is left alone has changed")


def check_it_keeps_its_promises(
    a_pass: Pass, graph_module: fx.GraphModule, inputs: Sequence[torch.Tensor], same_outputs: bool
) -> PassResult:
    before, expected = nodes(graph_module), None
    weights = {name: value.clone() for name, value in graph_module.state_dict().items()}
    if same_outputs:
        with torch.no_grad():
            expected = leaf_values(graph_module(*inputs))
    result = a_pass(graph_module)
    expect(result.modified, a_pass, f"the example is left alone: {result.reason}")
    if a_pass.in_place:
        expect(result.graph_module is graph_module, a_pass, "works in place, and gives another module")
    else:
        expect(result.graph_module is not graph_module, a_pass, "does not work in place, and gives what came in")
        expect(nodes(graph_module) == before, a_pass, "does not work in place, and the incoming graph has changed")
        same = all(torch.equal(value, weights[name]) for name, value in graph_module.state_dict().items())
        expect(same, a_pass, "does not work in place, and the incoming weights have changed")
    result.graph_module.graph.lint()
    if expected is not None:
        with torch.no_grad():
            found = leaf_values(result.graph_module(*inputs))
        for one, other in zip(found, expected, strict=False):  # a state may follow
            error = (one - other).abs().max().item() if one.shape == other.shape else float("inf")
            expect(error < 1e-5, a_pass, f"the outputs differ by {error}")
        expect(len(found) >= len(expected), a_pass, f"{len(found)} outputs of {len(expected)}")
    return result


def check_pass(
    a_pass: Pass,
    graph_module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    same_outputs: bool = True,
    applies_everywhere: bool = False,
) -> PassResult:
    """All that a pass promises, on a graph that it changes; what came of it, for the golden comparison."""
    check_it_is_a_frozen_dataclass_whose_docstring_is_the_equation(a_pass)
    if not applies_everywhere:
        check_a_graph_that_it_does_not_apply_to_is_left_alone_and_why(a_pass)
    return check_it_keeps_its_promises(a_pass, graph_module, inputs, same_outputs)
