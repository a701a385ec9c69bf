"""What stands beside the hidden states of a graph, masks above all: its values at any batch and length.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.dataflow import SIZE_ONLY, valued_inputs
from thesean.passes.analyse.positions import table_rows
from thesean.passes.graph.nodes import attribute, compute
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature

aten = torch.ops.aten

BATCH, TIME = 2, 11

# where hidden states come from
_MIXES_FEATURES = (
    aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default, aten.addmm.default,
    aten.mm.default, aten.scaled_dot_product_attention.default,
)  # fmt: skip


class Sides:
    """A graph as it ran once, at `BATCH` rows of `time` steps, and what no hidden state flows into at other sizes.

    `values` are all nodes' in that run, `mains` the nodes that hidden states flow into.
    """

    def __init__(self, graph_module: fx.GraphModule, signature: Signature) -> None:
        self.graph_module = graph_module
        self.signature = signature
        self.time = min(TIME, table_rows(graph_module) or TIME)
        self.order = {n: i for i, n in enumerate(graph_module.graph.nodes)}
        self.values = record(graph_module, self._inputs(BATCH, self.time))
        self.mains = self._downstream()

    def _inputs(self, batch: int, time: int) -> dict[str, torch.Tensor]:
        device = next((str(p.device) for p in self.graph_module.parameters()), "cpu")
        sizes = {s: batch if s.startswith("batch") else time for s in self.signature.symbols}
        return self.signature.random_inputs(sizes, device=device)

    def _downstream(self) -> set[fx.Node]:
        """What hidden states flow into: all that follows a product with weights, or a module."""
        found: set[fx.Node] = set()
        for node in self.order:
            starts = node.op == "call_module" or node.target in _MIXES_FEATURES
            if starts or (not self._sizes_only(node) and not found.isdisjoint(valued_inputs(node))):
                found.add(node)
        return found

    def _sizes_only(self, node: fx.Node) -> bool:
        """No values flow into it. Told by what was recorded: a graph from a file has no metadata."""
        return not isinstance(self.values[node], (torch.Tensor, tuple, list)) or node.target in SIZE_ONLY

    def at(
        self, wanted: Iterable[fx.Node], batch: int, time: int, given: Mapping[fx.Node, Any]
    ) -> dict[fx.Node, Any] | None:
        """The values of what stands beside the scores at other sizes; None where hidden states flow into it."""
        inputs = self._inputs(batch, time)
        env: dict[fx.Node, Any] = dict(given)
        ends = set(wanted)
        needed, front = set(ends), list(ends)
        while front:
            node = front.pop()
            if node in env or node.target is aten.sym_size.int:
                continue
            if node in self.mains:
                return None
            for read in node.all_input_nodes:
                if read not in needed:
                    needed.add(read)
                    if read not in self.mains:
                        front.append(read)
        for node in sorted(needed, key=self.order.__getitem__):
            if node in env:
                continue
            if node.op == "placeholder":
                env[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                env[node] = attribute(self.graph_module, str(node.target))
            elif node in self.mains:  # of which no more than size and kind is read
                value = self.values[node]
                env[node] = value.new_zeros(self.resized(value.shape, batch, time))
            elif node.target is aten.sym_size.int:
                env[node] = self.size(node, batch, time)
            else:
                env[node] = compute(node, env.__getitem__)
        return env

    def size(self, node: fx.Node, batch: int, time: int) -> Any:
        value = self.values[node]
        return self.resized([value], batch, time)[0] if isinstance(value, int) else value

    def resized(self, shape: Iterable[int], batch: int, time: int) -> list[int]:
        """Recorded sizes at another batch and length; batch and heads may stand in one dimension."""
        sizes = list(shape)
        for at, size in enumerate(sizes):
            if size == self.time:
                sizes[at] = time
            elif (at == 0 or size == BATCH) and size % BATCH == 0:
                sizes[at] = size // BATCH * batch
        return sizes

    def behind(self, ends: Iterable[fx.Node]) -> list[fx.Node]:
        """All whose values flow into `ends`, nearest first."""
        found: dict[fx.Node, None] = {}
        front = list(ends)
        while front:
            node = front.pop(0)
            if node in found or node in self.mains:
                continue
            found[node] = None
            if node.target is not aten.sym_size.int and not self._sizes_only(node):
                front.extend(node.all_input_nodes)
        return list(found)
