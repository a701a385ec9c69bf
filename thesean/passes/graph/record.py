"""Run a graph and keep what its nodes were: probes replay regions on these values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import compute


class Recorded(dict[fx.Node, Any]):
    """Every node's value in one run, and what was found out on them, so that no region is probed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.findings: dict[Any, Any] = {}


@torch.no_grad()
def record(
    graph_module: fx.GraphModule, inputs: dict[str, torch.Tensor], given: Mapping[fx.Node, Any] | None = None
) -> Recorded:
    """Run once and keep every node's value: for probing on small inputs. `given` replaces what some would be."""
    values = Recorded()
    set_values = dict(given or {})

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = set_values[n] if n in set_values else super().run_node(n)
            return values[n]

    Recorder(graph_module, garbage_collect_values=False).run(*inputs.values())
    return values


@torch.no_grad()
def evaluate(nodes: Iterable[fx.Node], values: dict[fx.Node, Any], given: dict[fx.Node, Any], wanted: fx.Node) -> Any:
    """The value of `wanted` when `given` replaces recorded values: `nodes` are run in order, all else is recorded."""
    if wanted in given:
        return given[wanted]
    found = evaluate_all(nodes, values, given, last=wanted)
    return found[wanted] if wanted in found else values[wanted]


@torch.no_grad()
def evaluate_all(
    nodes: Iterable[fx.Node],
    values: Mapping[fx.Node, Any],
    given: Mapping[fx.Node, Any],
    last: fx.Node | None = None,
) -> dict[fx.Node, Any]:
    """The values of `given` and of all `nodes` up to `last`, as `evaluate` computes them."""
    env = dict(given)

    def look_up(node: fx.Node) -> Any:
        return env[node] if node in env else values[node]

    for node in nodes:
        if node in env:
            continue
        env[node] = compute(node, look_up)
        if node is last:
            break
    return env
