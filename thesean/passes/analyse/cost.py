"""What a node costs: parameters it reads and FLOPs at given sizes, on fake tensors, so nothing is computed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode

from thesean.passes.graph.nodes import LookingInterpreter, argument, attribute, constants_of
from thesean.passes.graph.signature import Signature
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.module import TargetModule

aten = torch.ops.aten


def count_params(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> int:
    """Parameters that these nodes read, each once."""
    paths = {str(c.target) for n in nodes for i in n.all_input_nodes for c in constants_of(i)}
    tensors = {id(t): t for t in (attribute(graph_module, p) for p in paths) if isinstance(t, torch.nn.Parameter)}
    return sum(t.numel() for t in tensors.values())


class SymbolicSizes(dict[str, int]):
    """Sizes of dynamic dimensions by name; one that was made of them, "batch*time" or "time//2 + 1", is computed."""

    def __missing__(self, name: str) -> int:
        try:
            return self._value(ast.parse(name.strip(), mode="eval").body)
        except (SyntaxError, TypeError) as error:
            raise KeyError(name) from error

    def _value(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name) if name in self:
                return self[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                return _OPERATORS[type(sign)](self._value(left), self._value(right))
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in _FUNCTIONS:
                return int(_FUNCTIONS[name](*map(self._value, arguments)))
        raise KeyError(ast.unparse(node))


# what torch writes sizes with
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max, "Min": min, "Mod": operator.mod, "PythonMod": operator.mod, "FloorDiv": operator.floordiv,
}  # fmt: skip


class _FlopInterpreter(LookingInterpreter):
    """FLOPs (two per multiply-add) a node; a target module says its own, since recurrences hide theirs."""

    def __init__(self, graph_module: fx.GraphModule, sizes: dict[str, int], facts: dict[str, PartFacts]) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self.sizes, self.facts = sizes, facts
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        counter = FlopCounterMode(display=False)
        with counter:
            value = super().run_node(n)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, TargetModule) and str(n.target) in self.facts:
            self.flops[n] = module.flops(self.facts[str(n.target)], self.sizes)
        elif n.target is aten.scaled_dot_product_attention.default:
            # the fused CPU kernel is not in torch's registry: q k' and w v
            q, k, v = (self.env_value(a) for a in n.args[:3])
            scores = math.prod(q.shape[:-1]) * k.shape[-2]
            self.flops[n] = 2 * scores * (q.shape[-1] + v.shape[-1])
        else:
            self.flops[n] = counter.get_total_flops()
        return value

    def env_value(self, node: Any) -> Any:
        return self.env[node]


def flops_by_node(
    graph_module: fx.GraphModule,
    signature: Signature,
    sizes: dict[str, int],
    facts: dict[str, PartFacts] | None = None,
) -> dict[fx.Node, int]:
    """FLOPs of every node in one forward at `sizes` of the dynamic dimensions; `facts` by module name."""
    known = _from_shapes(graph_module, sizes)
    if known is not None:
        return known
    inputs = signature.random_inputs(sizes)
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(v) for v in inputs.values()]
            interpreter = _FlopInterpreter(graph_module, sizes, facts or {})
            interpreter.run(*fake)
    except (DynamicOutputShapeException, DataDependentOutputException):  # a router sends tokens where they belong
        device = next((p.device for p in graph_module.parameters()), torch.device("cpu"))
        with torch.no_grad():
            interpreter = _FlopInterpreter(graph_module, sizes, facts or {})
            interpreter.run(*(v.to(device) for v in inputs.values()))
    return interpreter.flops


def _from_shapes(graph_module: fx.GraphModule, sizes: dict[str, int]) -> dict[fx.Node, int] | None:
    """The same without running anything, where every product carries its symbolic shapes; None elsewhere."""
    symbols = graph_module.meta.get("symbols", {})
    known: dict[str, int] = {}

    def number(dim: Any) -> int:
        if not isinstance(dim, torch.SymInt):
            return int(dim)
        text = str(dim)
        if text not in known:
            expression = dim.node.expr
            named = {s: sizes[symbols[str(s)]] for s in expression.free_symbols}
            known[text] = int(expression.subs(named))
        return known[text]

    def shape(node: Any) -> list[int]:
        return [number(d) for d in node.meta["val"].shape]

    flops: dict[fx.Node, int] = {}
    try:
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                return None
            name = node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
            if name in _RUN:
                return None
            flops[node] = _FORMULAS[name](node, shape) if name in _FORMULAS else 0
    except (KeyError, AttributeError):
        return None  # a graph from a file has no shapes, one with sizes that hang on data no numbers
    return flops


Shape = Callable[[Any], list[int]]


def _matmul(node: fx.Node, shape: Shape) -> int:
    """Two for each output and each entry of the contracted dimension."""
    return 2 * math.prod(shape(node)) * shape(node.args[0])[-1]


def _added_matmul(node: fx.Node, shape: Shape) -> int:
    return 2 * math.prod(shape(node)) * shape(node.args[1])[-1]


def _convolution(node: fx.Node, shape: Shape) -> int:
    weight = shape(node.args[1])
    return 2 * math.prod(shape(node)) * math.prod(weight[1:])


def _transposed_convolution(node: fx.Node, shape: Shape) -> int:
    weight = shape(node.args[1])
    return 2 * math.prod(shape(node.args[0])) * math.prod(weight[1:])


def _attention(node: fx.Node, shape: Shape) -> int:
    q, k, v = (shape(a) for a in node.args[:3])
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _cell(node: fx.Node, shape: Shape) -> int:
    """Every matrix once a token; the first argument is (batch, time, width)."""
    weights = [shape(w) for w in argument(node, 2, "params")]
    return 2 * math.prod(shape(node.args[0])[:2]) * sum(math.prod(w) for w in weights if len(w) >= 2)


_FORMULAS: dict[str, Callable[[fx.Node, Shape], int]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added_matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _cell),
}
# products in many forms: run on fake tensors to see what they come to
_RUN = {"einsum", "bilinear", "_trilinear", "convolution", "_convolution", "tensordot", "multi_head_attention_forward"}


def remaining_params(graph_module: fx.GraphModule, replaced: Mapping[fx.Node, fx.Node]) -> int:
    """Parameters that are still read when each of these nodes is made of the node it maps to, and of nothing else.

    Shared ones stay while anything reads them, and count once.
    """
    front = [graph_module.graph.output_node()]
    seen = set(front)
    while front:
        node = front.pop()
        sources = [replaced[node]] if node in replaced else node.all_input_nodes
        fresh = [s for s in sources if s not in seen]
        seen.update(fresh)
        front.extend(fresh)
    return count_params(graph_module, [n for n in seen if n not in replaced])
