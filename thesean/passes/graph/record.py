"""Run a graph and keep what its nodes were: probes replay regions on these values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import LookingInterpreter, compute
from thesean.passes.graph.widen import call_wide, compute_wide, is_half, same_memory, widened


class Recorded(dict[fx.Node, Any]):
    """Every node's value in one run, and what was found out on them, so that no region is probed twice.

    `wide`: half precision was computed in float32. Weights, and views of them, are kept as the guide has them, and
    widened each time that they are asked for: a copy of all would be twice as large as the guide.
    """

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.wide = wide
        self.findings: dict[Any, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        value = super().__getitem__(node)
        return widened(value) if self.wide else value

    def stored(self, node: fx.Node) -> Any:
        """A weight as the guide has it."""
        return super().__getitem__(node)


@torch.no_grad()
def record(
    graph_module: fx.GraphModule,
    inputs: dict[str, torch.Tensor],
    given: Mapping[fx.Node, Any] | None = None,
    wide: bool = False,
) -> Recorded:
    """Run once and keep every node's value: for probing on small inputs. `given` replaces what some would be."""
    values = Recorded(wide)
    set_values = dict(given or {})

    class Recorder(LookingInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            run = self._run_wide if wide else super().run_node
            value = values[n] = set_values[n] if n in set_values else run(n)
            return value  # as it is kept: the interpreter keeps it too

        def _run_wide(self, n: fx.Node) -> Any:
            if n.op == "call_function":
                inputs = n.all_input_nodes
                if n.target is torch.ops.aten.embedding.default:  # a few rows of what may be half of the weights
                    return widened(compute(n, values.stored))
                if inputs and all(is_half(values.stored(i)) for i in inputs):  # weights alone: all else is wide
                    view = compute(n, values.stored)
                    if same_memory(view, values.stored(inputs[0])):
                        return view
                return compute_wide(n, values.__getitem__)
            if n.op == "call_module":
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return call_wide(self.fetch_attr(str(n.target)), args, kwargs)
            value = super().run_node(n)
            return value if n.op == "get_attr" else widened(value)

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
    env = {node: _laid_out(value, values.get(node)) for node, value in given.items()}
    run = compute_wide if isinstance(values, Recorded) and values.wide else compute

    def look_up(node: fx.Node) -> Any:
        return env[node] if node in env else values[node]

    for node in nodes:
        if node in env:
            continue
        env[node] = run(node, look_up)
        if node is last:
            break
    return env


def _laid_out(value: Any, recorded: Any) -> Any:
    """The same numbers, strided as those that were recorded: a `view` that follows was traced on such."""
    if not isinstance(value, torch.Tensor) or not isinstance(recorded, torch.Tensor):
        return value
    if value.shape != recorded.shape or value.stride() == recorded.stride():
        return value
    return torch.empty_like(recorded, dtype=value.dtype).copy_(value)
