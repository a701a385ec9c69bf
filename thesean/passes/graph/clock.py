"""Which of a graph's inputs tells how many rows and steps there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from thesean.passes.graph.signature import Signature

aten = torch.ops.aten


class Clock(NamedTuple):
    """An input with a dimension of time; `batch` is None where it has no other."""

    node: fx.Node
    batch: int | None
    time: int

    def steps(self, graph: fx.Graph) -> fx.Node:
        """How many steps come in, counted at the graph's insertion point."""
        return graph.call_function(aten.sym_size.int, (self.node, self.time))

    def rows(self, graph: fx.Graph) -> fx.Node | int:
        return 1 if self.batch is None else graph.call_function(aten.sym_size.int, (self.node, self.batch))

    def tokens(self, graph: fx.Graph, device: torch.device) -> fx.Node:
        """(B, T) booleans of a text without padding."""
        sizes = [self.rows(graph), self.steps(graph)]
        return graph.call_function(aten.ones.default, (sizes,), {"dtype": torch.bool, "device": device})


NO_TIME = "there is no single dimension of time"  # why a pass that gives a state leaves a graph alone


def has_one_time(signature: Signature) -> bool:
    """Whether all free lengths are one, and it may be a single step."""
    names = {s for s in signature.symbols if not s.startswith("batch")}
    return len(names) == 1 and not any(b.name in names and b.least > 1 for b in signature.bounds)


def find_clock(graph: fx.Graph, signature: Signature) -> Clock:
    """The first input that has one. Raises StopIteration where no dimension is time."""
    return next(
        Clock(node, next((d for d in range(len(spec.shape)) if d != time), None), time)
        for spec, node in zip(signature.inputs, graph.find_nodes(op="placeholder"), strict=False)
        for time, size in enumerate(spec.shape)
        if isinstance(size, str) and not size.startswith("batch") and not spec.held
    )
