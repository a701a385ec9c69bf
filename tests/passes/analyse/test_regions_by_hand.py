"""What work is, what a norm, a sum and a region are, on small graphs with the right answer beside.

B batch, T time, D width
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn

from tests.written import ends, written
from thesean.errors import PassRefused
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import (
    Region,
    check_region,
    is_branch,
    is_linear_map,
    is_single_entry_single_exit,
    is_work,
    join,
    module_regions,
    past_norm,
    same_shape,
    shared_path,
    span,
    sum_of,
)

aten = torch.ops.aten
END = 2**63 - 1

Made = Callable[..., Any]

X_BTD = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))


def cut(c: Any, x: Any, start: int, end: int, dim: int = 1) -> Any:
    return c(aten.slice.Tensor, x, dim, start, end)


def row(c: Any, x: Any) -> Any:
    return c(aten.zeros_like.default, cut(c, x, 0, 1))


# what of x_BTD mixes its steps by itself, without a matrix, and gives as many
MIXES: dict[str, tuple[Made, bool]] = {
    "a Fourier transform": (lambda c, x: c(aten.fft_fft.default, x, None, 1), True),
    "a real one": (lambda c, x: c(aten.fft_rfft.default, x, None, 1), True),
    "half of the frequencies' order": (lambda c, x: c(aten.fft_fftshift.default, x, [1]), False),
    "a running sum": (lambda c, x: c(aten.cumsum.default, x, 1), True),
    "a running sum from the back": (lambda c, x: c(aten.cumsum.default, x, -2), True),
    "a running sum of the width": (lambda c, x: c(aten.cumsum.default, x, 2), False),
    "a running sum of rows": (lambda c, x: c(aten.cumsum.default, x, 0), False),
    "a running sum, by name": (lambda c, x: c(aten.cumsum.default, x, dim=1), True),
    "a running product": (lambda c, x: c(aten.cumprod.default, x, 1), True),
    "a running maximum": (lambda c, x: c(aten.cummax.default, x, 1), True),
    "a running maximum of the width": (lambda c, x: c(aten.cummax.default, x, 2), False),
    "an order": (lambda c, x: c(aten.sort.default, x, 1), True),
    "an order of the width": (lambda c, x: c(aten.sort.default, x, -1), False),
    "a roll": (lambda c, x: c(aten.roll.default, x, [1], [1]), True),
    "a roll of the width": (lambda c, x: c(aten.roll.default, x, [1], [2]), False),
    "a roll of both": (lambda c, x: c(aten.roll.default, x, [1, 1], [2, 1]), True),
    "a roll, by names": (lambda c, x: c(aten.roll.default, x, shifts=[1], dims=[1]), True),
    "a flip": (lambda c, x: c(aten.flip.default, x, [1]), True),
    "a flip of the width": (lambda c, x: c(aten.flip.default, x, [2]), False),
    "a pool of neighbours": (lambda c, x: c(aten.avg_pool1d.default, x, [3], [1], [1]), True),
    "a pool that chooses": (lambda c, x: c(aten.avg_pool1d.default, x, [2], [2]), False),
    "a maximum of neighbours": (lambda c, x: c(aten.max_pool1d.default, x, [3], [1], [1]), True),
    "padding": (lambda c, x: c(aten.pad.default, x, [0, 0, 1, 0]), False),
    "a shift by padding": (lambda c, x: c(aten.pad.default, x, [0, 0, 1, -1]), True),
    "a shift by padding, ahead": (lambda c, x: c(aten.constant_pad_nd.default, x, [0, 0, -2, 2]), True),
    "a shift by padding, by name": (lambda c, x: c(aten.pad.default, x, pad=[0, 0, 1, -1]), True),
    "a shift of the width by padding": (lambda c, x: c(aten.pad.default, x, [1, -1]), False),
    "padding by none": (lambda c, x: c(aten.pad.default, x, [0, 0, 0, 0]), False),
    "padding at both ends": (lambda c, x: c(aten.pad.default, x, [0, 0, 1, 1]), False),
    "a slice that is padded": (lambda c, x: c(aten.pad.default, cut(c, x, 0, -1), [0, 0, 1, 0]), True),
    "a slice of the width that is padded": (
        lambda c, x: c(aten.pad.default, cut(c, x, 0, -1, 2), [1, 0, 0, 0]), False
    ),
    "a slice that is padded to more": (lambda c, x: c(aten.pad.default, cut(c, x, 0, -1), [0, 0, 2, 0]), False),
    "a step in front, the last one left out": (
        lambda c, x: c(aten.cat.default, [row(c, x), cut(c, x, 0, -1)], 1), True
    ),
    "the first one behind": (lambda c, x: c(aten.cat.default, [cut(c, x, 1, END), cut(c, x, 0, 1)], 1), True),
    "halves of the width, turned": (
        lambda c, x: c(aten.cat.default, [cut(c, x, 2, 4, 2), cut(c, x, 0, 2, 2)], 2), False
    ),
    "rows in another order": (lambda c, x: c(aten.cat.default, [cut(c, x, 1, 2, 0), cut(c, x, 0, 1, 0)]), False),
    "rows by no dimension's name": (
        lambda c, x: c(aten.cat.default, [c(aten.slice.Tensor, x, start=1), c(aten.slice.Tensor, x, end=1)]), False
    ),
    "one more step in front": (lambda c, x: c(aten.cat.default, [row(c, x), x], 1), False),
    "a function": (lambda c, x: c(aten.tanh.default, x), False),
    "a flip of an image": (lambda c, x: c(aten.flip.default, c(aten.unsqueeze.default, x, 1), [1]), False),
    "a flip of vectors": (lambda c, x: c(aten.flip.default, c(aten.select.int, x, 1, 0), [1]), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_mixing_without_a_matrix_is_work(name):
    made, mixes = MIXES[name]
    graph_module = written(made, X_BTD)
    end = ends(graph_module)
    assert is_work(end) == mixes
    assert not is_linear_map(end)
    assert Region(entry=X(graph_module), exit=end, nodes=(end,)).is_heavy() == mixes


def X(graph_module: fx.GraphModule) -> fx.Node:
    return graph_module.graph.find_nodes(op="placeholder")[0]


def test_a_slice_belongs_to_the_shift_that_it_is_made_for():
    graph_module = written(lambda c, x: c(aten.pad.default, cut(c, x, 0, -1), [0, 0, 1, 0]), X_BTD)
    assert [n.target for n in graph_module.graph.nodes if is_work(n)] == [aten.slice.Tensor, aten.pad.default]
    graph_module = written(
        lambda c, x: (c(aten.exp.default, s := cut(c, x, 0, -1)), c(aten.pad.default, s, [0, 0, 1, 0])), X_BTD
    )
    assert [n.target for n in graph_module.graph.nodes if is_work(n)] == [aten.slice.Tensor, aten.pad.default]
    graph_module = written(lambda c, x: c(aten.exp.default, cut(c, x, 0, -1)), X_BTD)
    assert not any(is_work(n) for n in graph_module.graph.nodes)


# of x_BTD, a matrix (4, 4), a vector (4,) and a bank (3, 4, 4): what is a product with a matrix of the guide's own
MAPS: dict[str, tuple[Made, bool]] = {
    "linear": (lambda c, x, m, v, b: c(aten.linear.default, x, m), True),
    "matmul": (lambda c, x, m, v, b: c(aten.matmul.default, x, m), True),
    "matmul with a view": (lambda c, x, m, v, b: c(aten.matmul.default, x, c(aten.t.default, m)), True),
    "matmul with what was computed of it": (
        lambda c, x, m, v, b: c(aten.matmul.default, x, c(aten.mul.Tensor, m, 0.5)), True
    ),
    "einsum": (lambda c, x, m, v, b: c(aten.einsum.default, "btd,de->bte", [x, m]), True),
    "one of a bank": (lambda c, x, m, v, b: c(aten.matmul.default, x, c(aten.select.int, b, 0, 1)), True),
    "some of a bank, which states pick": (
        lambda c, x, m, v, b: c(
            aten.bmm.default, x, c(aten.index.Tensor, b, [c(aten.argmax.default, c(aten.select.int, x, 1, 0), 1)])
        ),
        True,
    ),
    "a cast of one": (lambda c, x, m, v, b: c(aten.matmul.default, x, c(aten.to.dtype, m, torch.float32)), True),
    "a convolution": (lambda c, x, m, v, b: c(aten.conv1d.default, c(aten.mT.default, x), c(aten.mT.default, b)), True),
    "states with each other": (lambda c, x, m, v, b: c(aten.matmul.default, x, c(aten.mT.default, x)), False),
    "a vector": (lambda c, x, m, v, b: c(aten.matmul.default, x, v), False),
    "a product element by element": (lambda c, x, m, v, b: c(aten.mul.Tensor, x, v), False),
    "a sum with a matrix": (lambda c, x, m, v, b: c(aten.add.Tensor, c(aten.select.int, x, 1, 0), v), False),
    "a norm": (lambda c, x, m, v, b: c(aten.layer_norm.default, x, [4], v), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_a_linear_map_is_a_product_with_a_matrix_of_the_guides_own(name):
    made, is_map = MAPS[name]
    held = {
        "m": nn.Parameter(torch.rand(4, 4)),
        "v": nn.Parameter(torch.rand(4)),
        "b": nn.Parameter(torch.rand(3, 4, 4)),
    }
    graph_module = written(made, X_BTD, **held)
    assert is_linear_map(ends(graph_module)) == is_map
    assert is_work(ends(graph_module)) == is_map


def rms(c: Any, x: Any, v: Any) -> Any:
    mean = c(aten.mean.dim, c(aten.mul.Tensor, x, x), [-1], True)
    return c(aten.mul.Tensor, c(aten.mul.Tensor, x, c(aten.rsqrt.default, c(aten.add.Scalar, mean, 1e-6))), v)


# of x_BTD, a matrix and a vector: what is added to x, and how many operators behind its end
NORMED: dict[str, tuple[Made, Made | None]] = {
    "as it is": (lambda c, x, m, v: c(aten.linear.default, x, m), None),
    "a norm": (lambda c, x, m, v: c(aten.linear.default, x, m), lambda c, y, v: c(aten.layer_norm.default, y, [4], v)),
    "one that is written out": (lambda c, x, m, v: c(aten.linear.default, x, m), rms),
    "a norm by a weight that is computed": (
        lambda c, x, m, v: c(aten.linear.default, x, m),
        lambda c, y, v: c(aten.layer_norm.default, y, [4], c(aten.add.Scalar, v, 1.0)),
    ),
    "a function": (lambda c, x, m, v: c(aten.linear.default, x, m), lambda c, y, v: c(aten.tanh.default, y)),
}


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("read_twice", [False, True])
def test_a_branch_ends_before_the_norm_that_alone_reads_it(name, read_twice):
    before, behind = NORMED[name]

    def made(c: Any, x: Any, m: Any, v: Any) -> Any:
        end = before(c, x, m, v)
        given = end if behind is None else behind(c, end, v)
        total = c(aten.add.Tensor, x, given)
        return [total, end, given, *([c(aten.exp.default, given)] if read_twice else [])]

    graph_module = written(made, X_BTD, m=nn.Parameter(torch.rand(4, 4)), v=nn.Parameter(torch.rand(4)))
    _, end, given, *_ = ends(graph_module)
    graph_module.graph.output_node().args = (ends(graph_module)[:1] + ends(graph_module)[3:],)
    region = Region(entry=X(graph_module), exit=end, nodes=(end,))
    is_norm = name not in ("as it is", "a function")
    assert past_norm(end) is (given if is_norm and not read_twice else end)
    assert is_branch(region) == (not read_twice and name != "a function")


def test_a_norm_that_is_not_the_only_reader_is_none():
    def made(c: Any, x: Any, v: Any) -> Any:
        end = c(aten.exp.default, x)
        return [end, c(aten.add.Tensor, c(aten.layer_norm.default, end, [4], v), c(aten.tanh.default, end))]

    graph_module = written(made, X_BTD, v=nn.Parameter(torch.rand(4)))
    end, total = ends(graph_module)
    graph_module.graph.output_node().args = (total,)
    assert past_norm(end) is total  # all that is made of it alone
    graph_module = written(
        lambda c, x, v: (made(c, x, v), c(aten.layer_norm.default, x, [4], v)), X_BTD, v=torch.rand(4)
    )
    (end, _), other = ends(graph_module)
    assert past_norm(end) is end  # it leaves, too
    assert past_norm(other) is other


def test_shapes_are_the_same_in_all_dimensions_of_two_tensors():
    def made(c: Any, x: Any) -> Any:
        sizes = [c(aten.sym_size.int, x, 1), c(aten.sym_size.int, x, 1)]
        return [x, c(aten.exp.default, x), c(aten.mT.default, x), c(aten.sum.dim_IntList, x, [2]), *sizes]

    graph_module = written(made, X_BTD)
    first, *others = ends(graph_module)
    assert [same_shape(first, other) for other in others] == [True, False, False, False, False]
    assert [same_shape(other, first) for other in others] == [True, False, False, False, False]
    assert not same_shape(*others[-2:])


def drawn(seed: int) -> fx.GraphModule:
    """Sums and functions of earlier nodes, the last of which all lead to."""
    generator = random.Random(seed)

    def made(c: Any, x: Any) -> Any:
        nodes = [x]
        for _ in range(generator.randint(4, 10)):
            near = nodes[-generator.randint(1, 3) :]
            two = [generator.choice(near), generator.choice(near)]
            nodes.append(c(aten.add.Tensor, *two) if two[0] is not two[1] else c(aten.tanh.default, two[0]))
        return nodes[-1]

    return written(made, X_BTD)


@pytest.mark.parametrize("seed", range(16))
def test_a_span_is_all_between_where_no_other_way_leads_in_or_out(seed):
    graph_module = drawn(seed)
    flow = data_flow(graph_module.graph)
    nodes = [n for n in flow.order if n in flow.dag and n is not flow.sink]
    single = 0
    for a in nodes:
        for b in nx.descendants(flow.dag, a) & set(nodes):
            inside = (nx.descendants(flow.dag, a) & nx.ancestors(flow.dag, b)) | {b}
            in_by, out_by = flow.dag.predecessors, flow.dag.successors
            alone = all(set(in_by(n)) <= {a, *inside} and (n is b or set(out_by(n)) <= inside) for n in inside)
            found = span(flow, Region(entry=a, exit=a, nodes=(a,)), Region(entry=a, exit=b, nodes=(b,)))
            assert (found is not None) == alone
            region = Region(entry=a, exit=b, nodes=tuple(sorted(inside, key=flow.order.__getitem__)))
            assert is_single_entry_single_exit(flow, region) == alone
            assert found is None or found == region
            single += alone
    assert single


def test_neighbours_are_joined_in_order():
    graph_module = written(lambda c, x: c(aten.exp.default, c(aten.neg.default, c(aten.tanh.default, x))), X_BTD)
    x, tanh, neg, exp, _ = graph_module.graph.nodes
    rows = [Region(entry=a, exit=b, nodes=(b,)) for a, b in ((x, tanh), (tanh, neg), (neg, exp))]
    assert join(rows[0], rows[2], rows[1:2]) == Region(entry=x, exit=exp, nodes=(tanh, neg, exp))
    assert join(rows[0], rows[1], []) == Region(entry=x, exit=neg, nodes=(tanh, neg))
    assert join(rows[1], rows[1], []) == rows[1]
    flow = data_flow(graph_module.graph)
    check_region(graph_module, rows[1], flow, "here")
    with pytest.raises(PassRefused, match="here: expected one entry and one exit"):
        check_region(graph_module, Region(entry=x, exit=exp, nodes=(neg, exp)), flow, "here")
    with pytest.raises(PassRefused, match="here: the region belongs to another graph"):
        check_region(drawn(0), rows[1], flow, "here")


def test_a_fork_has_several_values_and_a_residual_adds_work_to_its_entry():
    def made(c: Any, x: Any, m: Any) -> Any:
        inner = c(aten.linear.default, x, m)
        return [
            inner,
            c(aten.add.Tensor, x, inner),
            c(aten.mul.Tensor, x, inner),
            c(aten.add.Tensor, x, c(aten.exp.default, x)),
        ]

    graph_module = written(made, X_BTD, m=nn.Parameter(torch.rand(4, 4)))
    x, (inner, total, product, light) = X(graph_module), ends(graph_module)
    rows = [(inner,), (inner, total), (inner, product), (light.all_input_nodes[1], light)]
    regions = [Region(entry=x, exit=row[-1], nodes=row) for row in rows]
    assert [r.is_fork() for r in regions] == [False, True, True, True]
    assert [r.is_residual() for r in regions] == [False, True, False, False]
    assert [r.is_heavy() for r in regions] == [True, True, True, False]
    assert not Region(entry=inner, exit=light, nodes=rows[3]).is_residual()
    by_name = {n.name: n for n in copied(graph_module).graph.nodes}
    there = Region(entry=x, exit=total, nodes=rows[1], name="said").translate(by_name)
    assert there == Region(
        entry=by_name[x.name], exit=by_name[total.name], nodes=tuple(by_name[n.name] for n in rows[1])
    )
    assert there.name == "said"


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def test_a_module_is_a_region_where_one_value_enters_and_one_leaves_and_each_call_is_one():
    # the modules around each node, and what it reads: a number is that node, "x" the input
    nodes: list[tuple[list[str], list[int | str]]] = [
        (["one", "one.a"], ["x"]),  # 0
        (["one", "one.b"], [0]),  # 1
        (["two"], [1]),  # 2
        (["two"], [1, 2]),  # 3
        (["two@1"], [3]),  # 4
        (["two@1"], [3, 4]),  # 5
        (["both"], [5, 3]),  # 6: two enter
        (["leaves"], [6]),  # 7
        (["leaves"], [7]),  # 8: two leave
        ([], [7, 8]),
    ]

    def made(c: Any, x: Any) -> Any:
        found: list[Any] = []
        for around, reads in nodes:
            given = [x if r == "x" else found[int(r)] for r in reads]
            found.append(c(aten.add.Tensor if len(given) == 2 else aten.tanh.default, *given))
            found[-1].meta["nn_module_stack"] = {name: (name.partition("@")[0], nn.Module) for name in around}
        return found[-1]

    graph_module = written(made, X_BTD)
    flow = data_flow(graph_module.graph)
    row = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    want = {"one": (X(graph_module), [0, 1]), "one.a": (X(graph_module), [0]), "one.b": (row[0], [1])}
    want |= {"two": (row[1], [2, 3]), "two#2": (row[3], [4, 5])}
    assert module_regions(flow) == {
        path: Region(entry=entry, exit=row[own[-1]], nodes=tuple(row[k] for k in own))
        for path, (entry, own) in want.items()
    }
    row[0].meta["val"] = (X_BTD, X_BTD)  # several values are no place to cut
    assert set(module_regions(flow)) == {"one", "two", "two#2"}


def test_views_have_no_say_in_what_a_region_is_called():
    graph_module = written(lambda c, x: c(aten.tanh.default, c(aten.view.default, x, [2, 24])), X_BTD)
    x, view, tanh, _ = graph_module.graph.nodes
    view.meta["nn_module_stack"] = {"a": ("a", nn.Module)}
    tanh.meta["nn_module_stack"] = {"a": ("a", nn.Module), "a.b": ("a.b", nn.Module)}
    assert Region(entry=x, exit=tanh, nodes=(view, tanh)).path() == "a.b"
    assert Region(entry=x, exit=view, nodes=(view,)).path() == "a"


@pytest.mark.parametrize("name", ["add", "add_"])
def test_a_sum_is_one_in_place_too(name):
    target = {"add": aten.add.Tensor, "add_": aten.add_.Tensor}[name]
    graph_module = written(lambda c, x: c(target, c(aten.exp.default, x), c(aten.tanh.default, x)), X_BTD)
    _, exp, tanh, total, _ = graph_module.graph.nodes
    assert sum_of(tanh) == (total, exp)
    assert sum_of(exp) == (total, tanh)
    assert is_branch(Region(entry=exp, exit=tanh, nodes=(tanh,)))


# of a node each: the modules around it, from the outside, and the path that they share
STACKS: list[tuple[list[list[str]], str]] = [
    ([], ""),
    ([[]], ""),
    ([["a", "a.b"]], "a.b"),
    ([["a", "a.b"], ["a", "a.c"]], "a"),
    ([["a", "a.b", "a.b.d"], ["a", "a.b", "a.b.e"]], "a.b"),
    ([["a", "a.h.0"], ["a", "a.h.1"]], "a"),  # a list of modules is never called
    ([["a", "a.h.0", "a.h.0.x"], ["a", "a.h.0", "a.h.0.y"]], "a.h.0"),
    ([["a", "a.b"], []], "a.b"),  # of no module
    ([["a"], ["b"]], ""),
    ([["h.0"], ["h.1"]], "h"),  # nor is its holder known
]


@pytest.mark.parametrize(("stacks", "path"), STACKS)
def test_nodes_share_the_innermost_module_that_is_called_around_all(stacks, path):
    graph = fx.Graph()
    nodes = [graph.placeholder(f"n_{at}") for at in range(len(stacks))]
    for node, stack in zip(nodes, stacks, strict=True):
        node.meta["nn_module_stack"] = {name: (name, nn.Module) for name in stack}
    assert shared_path(nodes) == path
    if nodes:
        region = Region(entry=nodes[0], exit=nodes[-1], nodes=tuple(nodes))
        assert region.path() == path
        assert Region(entry=nodes[0], exit=nodes[-1], nodes=tuple(nodes), name="said").path() == "said"
