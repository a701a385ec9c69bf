"""What stands beside hidden states is what it would be in a run at that batch and length.

B batch, T time, H heads, D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.models import vectors
from tests.written import ends, written
from thesean.passes.analyse.sides import BATCH, TIME, Sides
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten
D = 4

Made = Callable[..., Any]


def size(c: Any, x: Any, dim: int) -> Any:
    return c(aten.sym_size.int, x, dim)


def steps(c: Any, x: Any) -> Any:
    return c(aten.arange.default, size(c, x, 1))


def states(c: Any, x: Any, w: Any) -> Any:
    return c(aten.linear.default, x, w)


def wide(c: Any, mask: Any) -> Any:
    return c(aten.unsqueeze.default, c(aten.unsqueeze.default, mask, 1), 1)


# of x_BTD, mask_BT of ones, a matrix (D, D) and a table (D,)
BESIDE: dict[str, Made] = {
    "places": lambda c, x, m, w, t: steps(c, x),
    "places of what was computed": lambda c, x, m, w, t: steps(c, states(c, x, w)),
    "a causal half": lambda c, x, m, w, t: c(
        aten.tril.default, c(aten.ones.default, [size(c, x, 1), size(c, x, 1)], dtype=torch.bool)
    ),
    "a mask": lambda c, x, m, w, t: wide(c, c(aten.ne.Scalar, m, 0)),
    "a mask as wide as states": lambda c, x, m, w, t: c(
        aten.expand_as.default, c(aten.unsqueeze.default, m, 2), states(c, x, w)
    ),
    "a mask of a state's kind": lambda c, x, m, w, t: c(aten.type_as.default, m, states(c, x, w)),
    "ones as many as states": lambda c, x, m, w, t: c(aten.neg.default, c(aten.ones_like.default, states(c, x, w))),
    "zeros as many as states": lambda c, x, m, w, t: c(aten.zeros_like.default, states(c, x, w)),
    "ones for each row and step": lambda c, x, m, w, t: c(aten.ones.default, [size(c, x, 0), size(c, x, 1)]),
    "a row for each head": lambda c, x, m, w, t: c(
        aten.repeat_interleave.self_int, c(aten.to.dtype, m, torch.float32), 3, 0
    ),
    "a table": lambda c, x, m, w, t: c(aten.neg.default, t),
    "what the caller gave": lambda c, x, m, w, t: c(aten.cumsum.default, m, 1),
    "a number": lambda c, x, m, w, t: size(c, states(c, x, w), 1),
}


def sides_of(made: Made) -> tuple[fx.GraphModule, Signature, Sides]:
    mask = torch.ones(2, 5, dtype=torch.int64)

    def whole(c: Any, x: Any, m: Any, w: Any, t: Any) -> Any:
        return made(c, x, m, w, t), states(c, x, w)

    graph_module = written(whole, vectors(2, 5, D), mask, w=nn.Parameter(vectors(D, D)), t=torch.arange(4.0))
    signature = Signature(
        inputs=(
            InputSpec(name="x_0", dtype=torch.float32, shape=("batch", "time", D)),
            InputSpec(name="x_1", dtype=torch.int64, shape=("batch", "time"), example=mask),
        )
    )
    return graph_module, signature, Sides(graph_module, signature)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize(("batch", "time"), [(1, 7), (3, 11), (2, 20)])
def test_what_no_hidden_state_flows_into_is_known_at_any_size(name, batch, time):
    graph_module, signature, sides = sides_of(BESIDE[name])
    node = ends(graph_module)[0]
    found = sides.at([node], batch, time, {})
    assert found is not None
    wanted = record(graph_module, signature.random_inputs({"batch": batch, "time": time}))[node]
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found[node], wanted)
        assert found[node].dtype == wanted.dtype
    else:
        assert found[node] == wanted


@pytest.mark.parametrize(
    "made",
    [
        lambda c, x, m, w, t: states(c, x, w),
        lambda c, x, m, w, t: c(aten.gt.Scalar, states(c, x, w), 0),
        lambda c, x, m, w, t: c(aten.mul.Tensor, c(aten.unsqueeze.default, m, 2), states(c, x, w)),
        lambda c, x, m, w, t: c(aten.type_as.default, states(c, x, w), m),
        lambda c, x, m, w, t: c(aten.exp.default, c(aten.tanh.default, c(aten.matmul.default, x, w))),
        lambda c, x, m, w, t: c(aten.add.Tensor, steps(c, x), c(aten.argmax.default, states(c, x, w), 2)),
    ],
)
def test_what_a_hidden_state_flows_into_is_not(made):
    graph_module, _, sides = sides_of(made)
    assert sides.at([ends(graph_module)[0]], 1, 7, {}) is None


def test_what_is_given_is_taken_and_nothing_behind_it_is_asked():
    graph_module, _, sides = sides_of(
        lambda c, x, m, w, t: c(aten.neg.default, c(aten.mul.Tensor, c(aten.cumsum.default, m, 1), 2))
    )
    end = ends(graph_module)[0]
    (asked,) = end.all_input_nodes
    given = torch.ones(1, 7)
    found = sides.at([end], 1, 7, {asked: given})
    assert found is not None
    assert torch.equal(found[end], -given)
    assert set(found) == {end, asked}


def test_hidden_states_are_all_behind_a_product_and_a_module():
    graph_module, _, sides = sides_of(lambda c, x, m, w, t: c(aten.exp.default, states(c, c(aten.tanh.default, x), w)))
    assert {n.target for n in sides.mains if n.op == "call_function"} == {aten.exp.default, aten.linear.default}
    assert sides.time == TIME
    assert sides.values[graph_module.graph.find_nodes(op="placeholder")[0]].shape == (BATCH, TIME, D)


def test_a_table_of_positions_bounds_the_length_that_is_looked_at():
    def made(c: Any, x: Any, w: Any) -> Any:
        return c(aten.add.Tensor, states(c, x, w), c(aten.embedding.default, w, steps(c, x)))

    graph_module = written(made, vectors(2, 3, D), w=nn.Parameter(vectors(D, D)))
    signature = Signature(inputs=(InputSpec(name="x_0", dtype=torch.float32, shape=("batch", "time", D)),))
    assert Sides(graph_module, signature).time == D


def test_sizes_are_read_as_rows_and_steps_with_heads_in_one_with_rows_or_apart():
    _, _, sides = sides_of(BESIDE["places"])
    for shape, wanted in {
        (BATCH, TIME, D): [5, 30, D], (BATCH * 3, TIME, TIME): [15, 30, 30], (TIME, TIME): [30, 30], (1, TIME): [1, 30],
        (D, BATCH, TIME): [10, 5, 30], (3, BATCH): [3, 5], (): [],
    }.items():  # fmt: skip
        assert sides.resized(shape, 5, 30) == wanted, shape


def test_what_is_behind_is_told_nearest_first_and_ends_at_sizes_and_states():
    def made(c: Any, x: Any, m: Any, w: Any, t: Any) -> Any:
        late = c(aten.logical_and.default, c(aten.ne.Scalar, m, 0), c(aten.lt.Scalar, steps(c, states(c, x, w)), 3))
        return c(aten.logical_not.default, late)

    graph_module, _, sides = sides_of(made)
    end = ends(graph_module)[0]
    found = sides.behind([end])
    assert found[0] is end
    distance = {n: at for at, n in enumerate(found)}
    assert all(min(distance[u] for u in n.users if u in distance) < at for n, at in distance.items() if n is not end)
    assert [n.name for n in found if n.op == "placeholder"] == ["x_1"]
    assert not set(found) & sides.mains
