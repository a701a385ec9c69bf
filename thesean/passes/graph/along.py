"""Nodes' values on one batch, asked for one by one: one run of the network for all of them, whatever their number.

Where all of them are known beforehand, and on many batches, `Walk` lets go of more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.walk import value_of


class Along:
    """`get` runs on from where it stands, in the graph's order, and holds what a later node reads; `kept` are held for
    good. Asked for what lies behind, it begins anew. In eval mode, which is the caller's to set, and without gradients.
    """

    def __init__(
        self, graph_module: fx.GraphModule, inputs: Mapping[str, torch.Tensor], kept: Sequence[fx.Node] = ()
    ) -> None:
        self.graph_module, self.inputs = graph_module, inputs
        self._order = list(graph_module.graph.nodes)
        self._at = {node: at for at, node in enumerate(self._order)}
        self._last = {n: max((self._at[user] for user in n.users), default=-1) for n in self._order}
        self._last.update((node, len(self._order)) for node in kept)
        self._begin()

    def _begin(self) -> None:
        self._next = 0
        self._env: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def get(self, node: fx.Node) -> Any:
        if node in self._env:
            return self._env[node]
        if self._at[node] < self._next:
            self._begin()
        for now in self._order[self._next : self._at[node] + 1]:
            self._env[now] = value_of(self.graph_module, now, self._env, self.inputs)
            for read in {now, *now.all_input_nodes}:
                if self._last[read] <= self._at[now] and read is not node:
                    self._env.pop(read, None)
        self._next = self._at[node] + 1
        return self._env[node]
