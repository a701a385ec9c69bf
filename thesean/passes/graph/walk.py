"""Nodes' values on a few batches, step after step: each node is computed once, and let go when nothing later reads it.

`intermediates` runs a prefix of the network each time that it is asked; a walk through all parts costs one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean.passes.graph.nodes import above, attribute, compute
from thesean.passes.graph.shelf import Shelf

Inputs = Mapping[str, torch.Tensor]

# What all batches' values may take between two steps, or a quarter of the weights where that is more. Feature maps of
# many large images are far beyond it.
HELD_BYTES = 256 * 2**20


class Walk:
    """`get(step, number)` gives the values of the names in `steps[step]` on a batch; a batch's steps come in order.

    Between two steps, what later ones read is held, of as many batches as fit into `budget` bytes; the others' lies on
    the disk of the `shelf`, and without one they begin at their inputs again. Whoever changes a module that was run
    already calls `forget`. Nothing here asks for gradients or eval mode: that is the caller's.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        steps: Sequence[Sequence[str]],
        batches: Sequence[Inputs],
        budget: int | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.graph_module, self.batches, self.shelf = graph_module, batches, shelf
        by_name = {n.name: n for n in graph_module.graph.nodes}
        order = {n: i for i, n in enumerate(graph_module.graph.nodes)}
        self._ends = [[by_name[name] for name in dict.fromkeys(names)] for names in steps]
        self._runs: list[list[fx.Node]] = []  # what each step computes, and no earlier one did
        done: set[fx.Node] = set()
        for ends in self._ends:
            fresh = above(ends, done)
            done |= fresh
            self._runs.append(sorted(fresh, key=order.__getitem__))
        self._first = {n: step for step, run in enumerate(self._runs) for n in run}
        self._run = {n.name: n for n in self._first}
        self._dead = last_reads(self._runs, self._ends)
        own = [*graph_module.parameters(), *graph_module.buffers(), *(t for b in batches for t in b.values())]
        self._free = {_storage(t) for t in own}  # held by others in any case
        weights = {_storage(t): t.untyped_storage().nbytes() for t in graph_module.parameters()}
        self.budget = max(HELD_BYTES, sum(weights.values()) // 4) if budget is None else budget
        self.forget()

    def forget(self) -> None:
        """Begin anew with every batch: a module that was run has changed."""
        self._held: list[tuple[int, dict[fx.Node, Any]]] = [(0, {}) for _ in self.batches]
        self._bytes = [0 for _ in self.batches]

    def has_run(self, name: str, step: int) -> bool:
        """Whether the node of this name is computed by `step` or an earlier one."""
        return name in self._run and self._first[self._run[name]] <= step

    def get(self, step: int, number: int) -> dict[str, Any]:
        at, env = self._held[number]
        if at > step:
            at, env = 0, {}
        for now in range(at, step + 1):
            run_through(self.graph_module, self._runs[now], self._dead[now], env, self.batches[number])
            values = {n.name: env[n] for n in self._ends[now]} if now == step else {}
            for node in self._dead[now][-1]:
                env.pop(node, None)
        self._keep(step + 1, number, env)
        return values

    def put(self, name: str, number: int, value: Any) -> None:
        """The value of a node that a later step would compute, found in another way."""
        at, env = self._held[number]
        node = self._run.get(name)
        if node is not None and at and self._first[node] >= at:
            env[node] = value
            self._keep(at, number, env)

    def _keep(self, at: int, number: int, env: dict[fx.Node, Any]) -> None:
        tensors = [t for t in pytree.tree_leaves(list(env.values())) if isinstance(t, torch.Tensor)]
        held = {_storage(t): t.untyped_storage().nbytes() for t in tensors}
        size = sum(count for storage, count in held.items() if storage not in self._free)
        self._bytes[number] = 0
        fits = sum(self._bytes) + size <= self.budget
        self._bytes[number] = size if fits else 0
        if not fits and self.shelf is not None:
            env, fits = {node: self._mapped(value) for node, value in env.items()}, True
        self._held[number] = (at, env) if fits else (0, {})

    def _mapped(self, value: Any) -> Any:
        assert self.shelf is not None
        map_ = self.shelf.map
        return pytree.tree_map_only(torch.Tensor, lambda t: t if _storage(t) in self._free else map_(t), value)


def last_reads(runs: Sequence[Sequence[fx.Node]], ends: Sequence[Sequence[fx.Node]]) -> list[list[list[fx.Node]]]:
    """Of each run, the nodes that nothing reads after its first, second... node, and after its ends were read."""
    last: dict[fx.Node, tuple[int, int]] = {}
    for step, (run, wanted) in enumerate(zip(runs, ends, strict=True)):
        for at, node in enumerate(run):
            last[node] = (step, at)
            last.update((source, (step, at)) for source in node.all_input_nodes)
        last.update((node, (step, len(run))) for node in wanted)
    dead: list[list[list[fx.Node]]] = [[[] for _ in range(len(run) + 1)] for run in runs]
    for node, (step, at) in last.items():
        dead[step][at].append(node)
    return dead


def run_through(
    graph_module: fx.GraphModule,
    run: Sequence[fx.Node],
    dead: Sequence[Sequence[fx.Node]],
    env: dict[fx.Node, Any],
    inputs: Inputs,
) -> None:
    """Put the values of a run's nodes into `env`, in order, those excepted that it has; after each of them goes what is
    `dead` by then.
    """
    for node, gone in zip(run, dead, strict=False):
        if node not in env:
            env[node] = value_of(graph_module, node, env, inputs)
        for value in gone:
            env.pop(value, None)


def output_from(graph_module: fx.GraphModule, run: Sequence[fx.Node], env: dict[fx.Node, Any], inputs: Inputs) -> Any:
    """The graph's output, where `env` has all that a run of nodes up to it reads. Uses `env` up."""
    output = graph_module.graph.output_node()
    (dead,) = last_reads([run], [output.all_input_nodes])
    run_through(graph_module, run, dead, env, inputs)
    return fx.map_arg(output.args[0], env.__getitem__)


def value_of(graph_module: fx.GraphModule, node: fx.Node, env: Mapping[fx.Node, Any], inputs: Inputs) -> Any:
    """A node's value, where `env` has those that it reads."""
    if node.op == "placeholder":
        return inputs[str(node.target)]
    if node.op == "get_attr":
        return attribute(graph_module, str(node.target))
    if node.op == "call_module":
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        return graph_module.get_submodule(str(node.target))(*args, **kwargs)
    return compute(node, env.__getitem__)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # not its address: weights in slices come and go
