"""onnxruntime's LinearAttention => a function of products in blocks: what `kernels/linear_attention.py` computes.

The operator is fast where the processor has AVX-512, and elsewhere slower than a softmax attention over 512 steps. With
it, 4 heads of 64 features and 32 values take 0.39 ms for 512 steps, and as products 1.2 (onnxruntime 1.32, one thread).
One step stays the operator's, but for runtimes that don't have it.

B batch, T time, C steps of a block, N blocks, H heads of queries, G heads of keys and values, R = H / G, F features, K
width of a value
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from thesean.deploy.lowering.lean.edit import MICROSOFT, Node, is_kind, number
from thesean.deploy.lowering.lowered import add_function
from thesean.deploy.lowering.text import END, Text

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATOR = "LinearAttention"
DOMAIN = "thesean"

_BLOCK = 32
_RULES = ("linear", "gated")  # with a decay of a whole head, or none


def linear_products(model: ir.Model, portable: bool = False) -> int:
    """Calls of the function in place of the operator, wherever it decays by heads, bodies of functions included.
    `portable`: one step is products too, and all operators are ONNX's own.
    """
    from onnx_ir.passes.common import RemoveUnusedOpsetsPass

    opset, changed = model.opset_imports[""], 0
    for graph in _graphs(model):
        for node in _by_head(graph):
            heads, groups = number(node, "q_num_heads", 1), number(node, "kv_num_heads", 1)
            decays = number(node, "update_rule", "linear") == "gated"
            name = f"{OPERATOR}_{heads}_{groups}{'_gated' if decays else ''}"
            add_function(model, _function(name, (heads, groups), decays, opset, portable))
            node.attributes.clear()
            node.domain, node.op_type, node.version = DOMAIN, name, 1
            graph.opset_imports[DOMAIN] = 1
            changed += 1
    if changed:
        RemoveUnusedOpsetsPass()(model)
    return changed


def decays_by_head(model: ir.Model) -> bool:
    """Whether `linear_products` would change anything."""
    return any(next(_by_head(graph), None) is not None for graph in _graphs(model))


def heads_of(model: ir.Model) -> tuple[int, int]:
    """Heads of queries, and of keys, of the first such operator."""
    node = next(node for graph in _graphs(model) for node in _by_head(graph))
    return int(number(node, "q_num_heads", 1)), int(number(node, "kv_num_heads", 1))


def _graphs(model: ir.Model) -> list[Any]:
    """The graph, and the bodies of functions but for those that are written here, whose one step is the operator's."""
    functions = [f for f in model.functions.values() if f.domain != DOMAIN or not f.name.startswith(OPERATOR)]
    return [model.graph, *functions]


def _by_head(graph: Any) -> Iterator[Node]:
    nodes = list(graph.all_nodes())
    for node in nodes:
        if is_kind(node, OPERATOR, domain=MICROSOFT) and number(node, "update_rule", "linear") in _RULES:
            decay = node.inputs[4] if len(node.inputs) > 4 else None
            shape = None if decay is None else decay.shape
            by_head = shape is None or shape[2] == number(node, "kv_num_heads", 1)  # else one a feature
            if by_head and number(node, "scale", 0.0) == 1.0:
                yield node


def _function(name: str, heads: tuple[int, int], decays: bool, opset: int, portable: bool) -> str:
    given = ["query", "key", "value", "state", *(["log_decay"] if decays else [])]
    domains = f'"" : {opset}' + ("" if portable else f', "{MICROSOFT}" : 1')
    bodies = _step(given, *heads, decays, portable), _blocks(*heads, decays, portable)
    branch = [
        f"{end} () => (float[B, T, E] out_{end}, float[B, G, F, K] state_{end})\n{{\n" + "\n".join(lines) + "\n}"
        for end, lines in zip(("step", "chunk"), bodies, strict=True)
    ]
    return f"""<domain: "{DOMAIN}", opset_import: [{domains}]>
{name} ({", ".join(given)}) => (out, after)
{{
    steps = Shape <start = 1, end = 2> (query)
    one = Constant <value_ints = [1]> ()
    is_step = Equal (steps, one)
    out, after = If (is_step) <then_branch = {branch[0]}, else_branch = {branch[1]}>
}}
"""


def _step(given: list[str], heads: int, groups: int, decays: bool, portable: bool) -> list[str]:
    """T = 1."""
    t = Text("s")
    if not portable:
        rule = '"gated"' if decays else '"linear"'
        t("out_step, state_step", f"{MICROSOFT}.{OPERATOR}", *given, q_num_heads=heads, kv_num_heads=groups,
          scale=1.0, update_rule=rule)  # fmt: skip
        return t.lines
    t.reshape("query_BGRF", "query", 0, groups, heads // groups, -1)
    t.reshape("key_BGF1", "key", 0, groups, -1, 1)
    t.reshape("value_BG1K", "value", 0, groups, 1, -1)
    t("come", "Mul", "key_BGF1", "value_BG1K")
    held = "state"
    if decays:
        t("decay", "Exp", t.reshape("log_decay_BG11", "log_decay", 0, groups, 1, 1))
        held = t("held", "Mul", "state", "decay")
    t("state_step", "Add", held, "come")
    t("out_BGRK", "MatMul", "query_BGRF", "state_step")
    t.reshape("out_step", "out_BGRK", 0, 1, -1)
    return t.lines


def _turned(t: Text, made: str, left: str, right: str, turn: str, portable: bool) -> str:
    """left @ right, one of them with its last two axes exchanged: "A" or "B"."""
    if not portable:
        return t(made, f"{MICROSOFT}.FusedMatMul", left, right, **{f"trans{turn}": 1})
    sides = {"A": left, "B": right}
    sides[turn] = t(f"{made}_{turn}", "Transpose", sides[turn], perm=[0, 1, 2, 3, 5, 4])
    return t(made, "MatMul", sides["A"], sides["B"])


def _blocks(heads: int, groups: int, decays: bool, portable: bool) -> list[str]:
    """Any T: blocks see their own steps in a product, and what came before in the state at their start."""
    t, G, R = Text("c"), groups, heads // groups
    t("time", "Shape", "query", start=1, end=2)
    t("features", "Shape", "state", start=2, end=3)
    t("columns", "Shape", "state", start=3, end=4)
    if not decays:
        t("batch", "Shape", "query", start=0, end=1)
        t("sizes_BTG", "Concat", "batch", "time", t.ints(G), axis=0)
        t("log_decay", "ConstantOfShape", "sizes_BTG")
    # a last block is filled with steps of zeros, which change no state: nothing decays, and nothing comes in
    t("minus", "Neg", "time")
    t("missing", "Mod", "minus", t.ints(_BLOCK))
    t("pads", "Concat", t.ints(0, 0, 0, 0), "missing", t.ints(0), axis=0)
    t("log_decay_BT", "Pad", "log_decay", "pads")
    t("log_decay_BGT", "Transpose", "log_decay_BT", perm=[0, 2, 1])
    t.reshape("log_decay_BGNC", "log_decay_BGT", 0, 0, -1, _BLOCK)
    for x, last in (("query", "features"), ("key", "features"), ("value", "columns")):
        count, groups_apart = (heads, (G, R)) if x == "query" else (G, (G, 1))
        t(f"{x}_whole", "Pad", x, "pads")
        t(f"{x}_heads", "Concat", t.ints(0, -1, count), last, axis=0)
        t(f"{x}_by_step", "Reshape", f"{x}_whole", f"{x}_heads")
        t(f"{x}_by_head", "Transpose", f"{x}_by_step", perm=[0, 2, 1, 3])
        t(f"{x}_apart", "Concat", t.ints(0, *groups_apart, -1, _BLOCK), last, axis=0)
        t(f"{x}_BGRNCx", "Reshape", f"{x}_by_head", f"{x}_apart")
    inside_BGNCC = _decays(t, "inside", "log_decay_BGNC", 3)
    _turned(t, "scores", "query_BGRNCx", "key_BGRNCx", "B", portable)
    t("inside_BG1NCC", "Unsqueeze", inside_BGNCC, t.ints(2))
    t("weights", "Mul", "scores", "inside_BG1NCC")
    t("own", "MatMul", "weights", "value_BGRNCx")

    t("so_far_BGNC", "CumSum", "log_decay_BGNC", t.constant("value_int = 3"))
    t("from_start_BGNC", "Exp", "so_far_BGNC")
    t.slice("to_end_BGN1C", inside_BGNCC, -1, END, 3)
    t("to_end_BG1NC1", "Reshape", "to_end_BGN1C", t.ints(0, G, 1, -1, _BLOCK, 1))
    t("faded_BG1NCF", "Mul", "key_BGRNCx", "to_end_BG1NC1")
    _turned(t, "come_BG1NFK", "faded_BG1NCF", "value_BGRNCx", "A", portable)
    t.slice("whole_BGN1", "so_far_BGNC", -1, END, 3)
    t("whole_BGN", "Squeeze", "whole_BGN1", t.ints(3))
    across_BGNN = _decays(t, "across", "whole_BGN", 2)
    t("flat", "Mul", "features", "columns")
    t("come_sizes", "Concat", t.ints(0, G, -1), "flat", axis=0)
    t("come_BGNx", "Reshape", "come_BG1NFK", "come_sizes")
    t("came_BGNx", "MatMul", across_BGNN, "come_BGNx")
    t("all_BGN", "CumSum", "whole_BGN", t.constant("value_int = 2"))
    t("left_BGN", "Exp", "all_BGN")
    t("left_BGN1", "Unsqueeze", "left_BGN", t.ints(3))
    t.reshape("first_BG1x", "state", 0, 0, 1, -1)
    t("carried_BGNx", "Mul", "left_BGN1", "first_BG1x")
    t("after_BGNx", "Add", "came_BGNx", "carried_BGNx")
    t("states_BGNx", "Concat", "first_BG1x", "after_BGNx", axis=2)  # N + 1 of them
    t.slice("before_BGNx", "states_BGNx", 0, -1, 2)
    t.slice("last_BG1x", "states_BGNx", -1, END, 2)
    t("before_sizes", "Concat", t.ints(0, 0, 1, -1), "features", "columns", axis=0)
    t("before_BG1NFK", "Reshape", "before_BGNx", "before_sizes")
    t("from_start_BG1NC1", "Unsqueeze", "from_start_BGNC", t.ints(2, 5))
    t("asked", "Mul", "query_BGRNCx", "from_start_BG1NC1")
    t("older", "MatMul", "asked", "before_BG1NFK")

    t("out_BGRNCK", "Add", "own", "older")
    t("out_apart", "Concat", t.ints(0, heads, -1), "columns", axis=0)
    t("out_BHTK", "Reshape", "out_BGRNCK", "out_apart")
    t("out_BTHK", "Transpose", "out_BHTK", perm=[0, 2, 1, 3])
    t("width", "Mul", "columns", t.ints(heads))
    t("out_sizes", "Concat", t.ints(0, -1), "width", axis=0)
    t("out_whole", "Reshape", "out_BTHK", "out_sizes")
    t("out_chunk", "Slice", "out_whole", t.ints(0), "time", t.ints(1))
    t("state_sizes", "Concat", t.ints(0, 0), "features", "columns", axis=0)
    t("state_chunk", "Reshape", "last_BG1x", "state_sizes")
    return t.lines


def _decays(t: Text, name: str, log_decay: str, axis: int) -> str:
    """`decay_between` of the steps along the last axis, whose number is `axis`."""
    zero, one = t.constant("value_int = 0"), t.constant("value_int = 1")
    t(f"{name}_count", "Shape", log_decay, start=axis, end=axis + 1)
    t(f"{name}_steps", "Squeeze", f"{name}_count", t.ints(0))
    t(f"{name}_at", "Range", zero, f"{name}_steps", one)
    t(f"{name}_later", "Unsqueeze", f"{name}_at", t.ints(1))
    t(f"{name}_sooner", "Unsqueeze", f"{name}_at", t.ints(0))
    t(f"{name}_below", "Greater", f"{name}_later", f"{name}_sooner")
    t(f"{name}_above", "Less", f"{name}_later", f"{name}_sooner")
    t(f"{name}_one", "Unsqueeze", log_decay, t.ints(axis + 1))
    t(f"{name}_own", "Where", f"{name}_below", f"{name}_one", t.number(0.0))
    t(f"{name}_sums", "CumSum", f"{name}_own", t.constant(f"value_int = {axis}"))
    t(f"{name}_seen", "Where", f"{name}_above", t.constant("value = float {-inf}"), f"{name}_sums")
    return t(f"{name}_decay", "Exp", f"{name}_seen")
