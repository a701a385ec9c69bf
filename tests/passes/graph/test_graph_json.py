from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests import captured
from tests.models import vectors
from thesean.errors import ArtifactError
from thesean.passes.graph.graph_json import dump, load, resolve_target, target_name
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan


@pytest.mark.thorough
@pytest.mark.parametrize(
    "guide", [captured.gpt2, captured.bert, captured.llama, captured.encoder, captured.resnet, captured.tied]
)
def test_a_graph_comes_back_from_json_as_it_was(guide):
    graph = guide().graph_module.graph
    again = load(json.loads(json.dumps(dump(graph))))
    assert text(again) == text(graph)
    assert dump(again) == dump(graph)


def test_a_hybrid_comes_back_and_computes_the_same():
    guide = captured.gpt2()
    hybrid = build_hybrid(make_plan(guide, "gru")).graph_module
    again = fx.GraphModule(hybrid, load(json.loads(json.dumps(dump(hybrid.graph)))))
    inputs = guide.signature.random_inputs({"batch": 2, "time": 5})
    assert torch.equal(again(**inputs)["logits"], hybrid(**inputs)["logits"])


def test_a_replacement_that_is_given_a_mask_is_given_it_again():
    hybrid = build_hybrid(make_plan(captured.bert(), "linear-attention"))
    for r in hybrid.replacements:
        nn.init.normal_(hybrid.module(r).last.weight)  # type: ignore[arg-type]
    graph_module = hybrid.graph_module
    again = fx.GraphModule(graph_module, load(json.loads(json.dumps(dump(graph_module.graph)))))
    assert text(again.graph) == text(graph_module.graph)
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    found, expected = (m(ids, mask)["last_hidden_state"] for m in (again, graph_module))
    assert torch.equal(found, expected)
    assert not torch.allclose(expected[1], graph_module(ids, torch.ones_like(mask))["last_hidden_state"][1])


def test_every_kind_of_argument_comes_back():
    graph = fx.Graph()
    x = graph.placeholder("x")
    arguments: Any = (
        x, None, True, 3, -0.5, math.inf, -math.inf, "tanh", torch.float16, torch.device("cpu"), torch.strided,
        torch.channels_last, slice(None, 3, x), (1, (x, 2)), [x, [4]], {"a": x, "b": (1,)},
    )  # fmt: skip
    graph.output(arguments)
    (again,) = load(json.loads(json.dumps(dump(graph)))).output_node().args
    expected = fx.map_arg(arguments, lambda n: n.name)
    assert fx.map_arg(again, lambda n: n.name) == expected


def test_every_kind_of_node_keeps_its_name():
    graph = fx.Graph()
    x = graph.create_node("placeholder", "x", name="x")
    made = graph.create_node("call_module", "part", (x,), name="named_otherwise")
    weight = graph.create_node("get_attr", "part.weight", name="of_its_own")
    graph.output(graph.create_node("call_function", torch.ops.aten.add.Tensor, (made, weight), name="total"))
    names = [n.name for n in load(dump(graph)).nodes]
    assert names == [n.name for n in graph.nodes]


def test_not_a_number_comes_back():
    graph = fx.Graph()
    graph.output((graph.placeholder("x"), math.nan))
    again: Any = load(json.loads(json.dumps(dump(graph)))).output_node().args[0]
    assert math.isnan(again[1])


def rows() -> list[dict]:
    """A small good graph: x -> relu(x)."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.relu.default, (x,)))
    return dump(graph)


def altered(**changes) -> list[dict]:
    body = copy.deepcopy(rows())
    body[1] |= changes
    return body


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.setitem",
        "torch.load",
        "torch.hub.load",
        "aten.from_file.default",  # reads any file
        "aten.from_file",
        "aten.relu_.default",  # mutable
        "aten.add.out",
        "aten.set_.source_Tensor",
        "aten.__class__.default",
        "aten.relu.__class__",
        "aten._fill_mem_eff_dropout_mask_.default",
        "prim.device.default",
        "prims.add.default",
        "aten.relu",
        "aten.relu.default.__call__",
        "aten",
        "",
        None,
        7,
        ["aten", "relu", "default"],
    ],
)
def test_operators_outside_of_the_allow_list_are_refused(target):
    with pytest.raises(ArtifactError):
        resolve_target(target)
    with pytest.raises(ArtifactError):
        load(altered(target=target))


@pytest.mark.parametrize("function", [os.system, print, torch.relu, eval, torch.ops.aten.relu_.default])
def test_what_could_not_be_loaded_is_not_saved(function):
    with pytest.raises(ArtifactError, match=r"can't be saved: expected one of passes/graph/operators\.py"):
        target_name(function)


@pytest.mark.parametrize("name", ["aten.conv2d.padding", "aten.scatter_reduce.two", "aten.fft_fft.default"])
def test_text_that_names_a_mode_is_harmless(name):
    assert target_name(resolve_target(name)) == name


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, torch.ones(2)])
def test_arguments_without_a_json_form_are_not_saved(value):
    graph = fx.Graph()
    graph.output((graph.placeholder("x"), value))
    with pytest.raises(ArtifactError, match="can't be saved"):
        dump(graph)


BAD_NAMES = ["__class__", "a.__globals__.b", "", "a..b"]
ODD_NAMES = [
    "x; import os", "a b", "x)", "y-z", "1", "[cls]", "user id", "age-group", "日本", "x'", "{x}", "#", "%s", 'x"',
    'x"), print("', "x\\", "\\u0022", "x\nimport os", "tab\t", "class", "lambda", "None", "__pre", "ﬁt",
]  # fmt: skip


def test_no_odd_name_is_read_where_torch_writes_it_in_another_way(monkeypatch):
    """As it does by itself, between quotes that a name can end."""
    row = {"op": "get_attr", "name": "n", "target": 'x"), print("'}
    altered_rows = [row, {"op": "output", "name": "output", "target": "output", "value": {"node": "n"}}]
    monkeypatch.setattr("torch.fx.graph._format_target", lambda base, path: f'getattr({base}, "{path}")')
    with pytest.raises(ArtifactError, match="is no name that this version of torch can write"):
        load(altered_rows)


@pytest.mark.parametrize("op", ["get_attr", "call_module", "placeholder"])
@pytest.mark.parametrize("target", BAD_NAMES)
def test_attribute_paths_that_are_not_names_are_refused(op, target):
    with pytest.raises(ArtifactError):
        load(altered(op=op, target=target))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_that_a_module_may_have_are_names_and_nothing_else(name):
    root = nn.ModuleDict({name: nn.Linear(3, 3)})
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    again = load(json.loads(json.dumps(dump(graph))))
    x = vectors(2, 3)
    assert torch.equal(fx.GraphModule(root, again)(x), root[name](x))
    if name != "__pre":
        with pytest.raises(ArtifactError):
            load(altered(op="placeholder", target=name))  # a parameter of the generated function


@pytest.mark.parametrize(
    "name", ["x; import os", "a b", "", "1a", None, 3, "a\nb", "lambda", "None", "ſelf", "x" * 3000]
)
def test_node_names_that_are_not_names_are_refused(name):
    with pytest.raises(ArtifactError):
        load(altered(name=name))


@pytest.mark.parametrize("key", ["x=1, y", "a b", "", "__import__('os')", "lambda: 0", "lambda", "inplace", "input"])
def test_keywords_that_are_not_names_are_refused(key):
    with pytest.raises(ArtifactError):
        load(altered(kwargs={key: 1}))


@pytest.mark.parametrize(
    "argument",
    [
        {"node": "nowhere"},
        {"dtype": "load"},
        {"device": "meta:0"},
        {"device": "cuda"},
        {"device": ["cpu"]},
        {"layout": "hub"},
        {"float": "__import__"},
        {"code": "1"},
        {"node": "x", "dtype": "float32"},
        {},
        {"slice": [1]},
        {"slice": 3},
        {"tuple": 3},
        {"dict": [1]},
        {"node": ["x"]},
    ],
)
def test_malformed_arguments_are_refused(argument):
    with pytest.raises(ArtifactError):
        load(altered(args=[argument]))


@pytest.mark.parametrize("around", [lambda v: [v], lambda v: {"tuple": [v]}, lambda v: {"dict": {"a": v}}])
def test_values_are_nested_so_deep_and_no_deeper(around):
    value: Any = {"node": "x"}
    for _ in range(16):
        value = around(value)
    body = rows()
    body[-1]["value"] = value
    assert load(body).output_node().all_input_nodes
    body[-1]["value"] = around(value)
    with pytest.raises(ArtifactError, match="a value is nested more than 16 levels deep"):
        load(body)


@pytest.mark.parametrize(
    "body",
    [
        None, {}, [], 3, "graph", [3], [None], [["x"]], [{}], [{"op": "output"}],
        [{"op": "placeholder", "name": "x", "target": "x"}],
    ],
)  # fmt: skip
def test_what_is_not_a_graph_is_refused(body):
    with pytest.raises(ArtifactError):
        load(body)


def test_truncated_graphs_are_refused():
    whole = dump(captured.mlp().graph_module.graph)
    for length in range(len(whole)):  # by a few nodes or by many
        with pytest.raises(ArtifactError):
            load(whole[:length])


def test_nodes_after_the_output_and_names_used_twice_are_refused():
    body = rows()
    with pytest.raises(ArtifactError):
        load([*body, body[1]])
    with pytest.raises(ArtifactError):
        load([body[0], body[1], body[1], body[2]])
    with pytest.raises(ArtifactError):
        load([body[0], body[2], body[2]])


def test_what_torch_finds_wrong_with_a_graph_is_told(monkeypatch):
    def lint(_: fx.Graph) -> None:
        raise RuntimeError("a check of a later version")

    body = rows()
    monkeypatch.setattr(fx.Graph, "lint", lint)
    with pytest.raises(ArtifactError, match=r"the nodes are no graph \(a check of a later version\)"):
        load(body)


@pytest.mark.parametrize(
    "target", ["self", "torch", "lambda", "ſelf", "device", "getattr", "inf", "slice", "x.y", "*x", "x=1"]
)
def test_inputs_that_generated_code_would_trip_over_are_refused(target):
    body = rows()
    body[0]["target"] = target
    with pytest.raises(ArtifactError):
        load(body)


def test_names_are_of_some_length():
    body = rows()
    body[0]["target"] = "a" * 2000
    assert [n.target for n in load(body).find_nodes(op="placeholder")] == ["a" * 2000]
    body[0]["target"] = "a" * 2001
    with pytest.raises(ArtifactError, match="is not an input's name"):
        load(body)


def test_inputs_come_first_and_once_and_without_a_value_of_their_own():
    first, second, last = rows()
    again = {**first, "name": "y"}
    for body in ([first, again, second, last], [first, second, {**again, "target": "y"}, last]):
        with pytest.raises(ArtifactError, match="the inputs first, each of them once"):
            load(body)
    for more in ({"args": [1]}, {"kwargs": {"a": 1}}):
        with pytest.raises(ArtifactError, match="is not an input's name"):
            load([{**first, **more}, second, last])


@pytest.mark.parametrize("target", [5, None, ["a"], "a" * 2001, "a." * 1000 + "a"])
def test_an_attributes_path_is_text_of_some_length(target):
    with pytest.raises(ArtifactError, match="not an attribute's path"):
        load(altered(op="get_attr", target=target, args=[]))
    assert load(altered(op="get_attr", target="a." * 999 + "aa", args=[])).find_nodes(op="get_attr")


@pytest.mark.parametrize("op", ["call_method", "root", "import", None, 3])
def test_other_kinds_of_nodes_are_refused(op):
    with pytest.raises(ArtifactError):
        load(altered(op=op))


@pytest.mark.parametrize("field", ["op", "name", "target", "args"])
def test_missing_fields_are_refused(field):
    body = rows()
    del body[1][field]
    with pytest.raises(ArtifactError):
        load(body)


def test_nothing_is_executed_on_loading(tmp_path: Path):
    mark = tmp_path / "mark"
    for target, args in (
        ("os.system", [f"touch {mark}"]),
        ("builtins.exec", [f"open({str(mark)!r}, 'w')"]),
        ("aten.from_file.default", [str(mark), True, 4]),
    ):
        with pytest.raises(ArtifactError):
            load(altered(target=target, args=args))
    with pytest.raises(ArtifactError):
        load(altered(op="get_attr", name=f"x = open({str(mark)!r}, 'w')"))
    spelled = str(mark).replace(".", "")
    for target in (f"x = open('{spelled}', 'w')", f"'), open('{spelled}', 'w'), ('", f"{{open('{spelled}', 'w')}}"):
        module = fx.GraphModule(nn.ModuleDict({target: nn.Identity()}), load(altered(op="call_module", target=target)))
        module(vectors(1, 1))
    assert not Path(spelled).exists()
    assert not mark.exists()
