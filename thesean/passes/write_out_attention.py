"""Write attention out as two products and a softmax, for exporters that guard it against rows which see nothing.

B batch, H heads, T time of the queries, S time of the keys, K head width
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.analyse.dataflow import is_size_only
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten

_COUNTS = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.tril.default, aten.triu.default,
    aten.tril_indices.default, aten.triu_indices.default, aten.cumsum.default, aten.linspace.default,
    aten.eye.default, aten.eye.m,
}  # fmt: skip


@dataclass(frozen=True)
class WriteOutAttention(Pass):
    """scaled_dot_product_attention(q, k, v, mask) => softmax(scale q k' + (mask ? 0 : -inf)) v.

    The operator gives zeros where a query sees no key, and an exported one pays for that guard: two more passes over
    all scores, a quarter of a GPT-2's prefill of 512 tokens in onnxruntime. The products stand only where no query is
    blind: the mask is made from sizes, not from the caller's values, and every row of it sees a key on each of
    `probes`, inputs by name at several sizes. Masks that hide nothing at any position are left out. `trusted` names
    inputs that are masks themselves and stay what they are in the probes.
    """

    in_place = True

    probes: tuple[dict[str, torch.Tensor], ...]
    trusted: frozenset[str] = frozenset()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if "states" in graph_module.meta:  # the probes hold no states, and no attention over time is left
            return PassResult.unchanged(graph_module, "the graph takes chunks with a state")
        graph = graph_module.graph
        found = list(graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default))
        plain = [n for n in found if _is_plain(n)]
        masks = {m for n in plain if (m := _mask(n)) is not None and not _reads_values(m, self.trusted)}
        hides = _hiding(graph_module, masks, self.probes, self.trusted)
        written: dict[fx.Node, fx.Node] = {}
        changed = 0
        for node in plain:
            mask = _mask(node)
            if mask is None or mask in hides:
                _write_out(graph, node, mask if mask is not None and hides[mask] else None, written)
                changed += 1
        if not changed:
            reason = "no attention is computed" if not found else "a query may see no key"
            return PassResult.unchanged(graph_module, reason)
        erase_dead(graph)
        return PassResult(graph_module=graph_module, modified=True)


def _mask(node: fx.Node) -> fx.Node | None:
    found = argument(node, 3, "attn_mask")
    assert found is None or isinstance(found, fx.Node)
    return found


def _is_plain(node: fx.Node) -> bool:
    """Four dimensions, as many heads of keys as of queries, no dropout, no mask of its own."""
    shapes = [i.meta["val"].shape for i in node.args[:3] if isinstance(i, fx.Node) and "val" in i.meta]
    return (
        len(shapes) == 3
        and all(len(s) == 4 for s in shapes)
        and len({str(s[1]) for s in shapes}) == 1
        and not argument(node, 4, "dropout_p", 0.0)
        and not argument(node, 5, "is_causal", False)
    )


def _reads_values(node: fx.Node, trusted: frozenset[str]) -> bool:
    """Whether any input's values, not its sizes alone, flow into a node."""
    return any(
        n.op == "call_module" or (n.op == "placeholder" and str(n.target) not in trusted) for n in _upstream(node)
    )


def _tells_positions_apart(node: fx.Node) -> bool:
    """Whether a node's own values may differ from position to position: a count, a table, a mask that is given."""
    return node.op in ("get_attr", "placeholder") or node.target in _COUNTS


def _upstream(node: fx.Node) -> set[fx.Node]:
    """A node and all whose values flow into it."""
    seen: set[fx.Node] = set()
    front = [node]
    while front:
        at = front.pop()
        if at not in seen:
            seen.add(at)
            if not is_size_only(at):
                front.extend(at.all_input_nodes)
    return seen


@torch.no_grad()
def _hiding(
    graph_module: fx.GraphModule,
    masks: set[fx.Node],
    probes: Sequence[dict[str, torch.Tensor]],
    trusted: frozenset[str],
) -> dict[fx.Node, bool]:
    """Masks of which every row sees a key on all probes -> whether they may hide any."""
    if not masks or not probes:
        return {}
    names = {m.name: m for m in masks}
    values_of = intermediates(graph_module, names, with_output=False)
    # a window hides nothing until an input is longer than it
    hides = {m: any(_tells_positions_apart(n) for n in _upstream(m)) for m in masks}
    blind: set[fx.Node] = set()
    for inputs in probes:
        for name, value in values_of(**inputs).items():
            sees = value if value.dtype == torch.bool else value > -math.inf
            hides[names[name]] |= not bool((value if sees is value else value == 0).all())
            if not bool(sees.any(-1).all()):
                blind.add(names[name])
    return {m: h for m, h in hides.items() if m not in blind}


def _write_out(graph: fx.Graph, node: fx.Node, mask: fx.Node | None, written: dict[fx.Node, fx.Node]) -> None:
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node)
    scale = argument(node, 6, "scale")
    scale = float(q.meta["val"].shape[-1]) ** -0.5 if scale is None else scale
    with graph.inserting_before(node):
        keys = graph.call_function(aten.transpose.int, (k, -2, -1))
        scores = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.matmul.default, (q, keys)), scale))
        if mask is not None:
            scores = graph.call_function(aten.add.Tensor, (scores, _bias(graph, mask, q.meta["val"].dtype, written)))
        weights = graph.call_function(aten.softmax.int, (scores, -1))
        out = graph.call_function(aten.matmul.default, (weights, v))
    out.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
    node.replace_all_uses_with(out)


def _bias(graph: fx.Graph, mask: fx.Node, dtype: torch.dtype, written: dict[fx.Node, fx.Node]) -> fx.Node:
    """What is added to the scores; once for all layers that share a mask."""
    if mask.meta["val"].dtype != torch.bool:
        return mask
    if mask not in written:
        with graph.inserting_after(mask):
            hidden = graph.call_function(aten.logical_not.default, (mask,))
        with graph.inserting_after(hidden):
            zeros = graph.call_function(aten.zeros_like.default, (mask,), {"dtype": dtype})
        with graph.inserting_after(zeros):
            written[mask] = graph.call_function(aten.masked_fill.Scalar, (zeros, hidden, -math.inf))
    return written[mask]
