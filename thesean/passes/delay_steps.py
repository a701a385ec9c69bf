"""A network whose parts look ahead as a stream: its outputs come late, and all that meets on the way meets as late.

B batch, T time, k steps of delay, K of all parts in a row
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import RELATES, is_close
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import leaf_nodes, leaf_values, owner
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.stream import (
    DELAY,
    SEEN,
    STREAM,
    Delay,
    Streamed,
    flushed,
    in_time,
    looks_ahead,
    steps_ahead,
    streamed,
)
from thesean.passes.graph.surgery import beside, end_of_call
from thesean.passes.graph.two_sizes import TwoSizes

aten = torch.ops.aten


@dataclass(frozen=True)
class DelaySteps(Pass):
    """y_t = part(x up to t + k)  =>  y_{t-k} = part(x up to t, seen), and x_t + y_t  =>  delay(x)_{t-k} + y_{t-k}.

    Every part that looks ahead becomes the stream that gives its outputs k steps late; what its output meets is delayed
    as much, and so is every output of the network: by K steps, the most that parts in a row come to. The graph has one
    more input, `seen` (B, T): True where a token comes in, False for the K steps after the last one that bring out the
    rest. Parts behind a delay are told by it which steps hold nothing yet. `meta["delay"]` is K, `meta["stream"]` the
    signature with `seen`. The first K outputs are void; the others are those of the whole sequence.

    The new graph shares its parameters with the incoming one, which stays as it was. Raises PassRefused, naming it, for
    what can't be delayed or told: positions or a cache that are read behind a part that looks ahead.
    """

    in_place = False

    signature: Signature

    def requires(self, graph_module: fx.GraphModule) -> None:
        times = [s for s in self.signature.symbols if not s.startswith("batch")]
        if looks_ahead(graph_module) and (len(times) != 1 or len(self.signature.symbols) > 2):
            found = ", ".join(self.signature.symbols) or "none"
            raise PassRefused(
                f"delay steps: expected inputs with a batch and one dynamic time dimension, found {found}."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if not looks_ahead(graph_module):
            return PassResult.unchanged(graph_module, "no part looks ahead")
        new = beside(graph_module)
        with evaluating(graph_module):
            two = TwoSizes(graph_module, self.signature)
            rewriting = _Rewriting(new, two, self.signature)
            new.meta[DELAY] = rewriting.run()
            new.meta[STREAM] = streamed(self.signature, str(rewriting.seen.target))
            new.delete_all_unused_submodules()
            new.recompile()
            new.eval()
            self._check(new, two, rewriting.late)
        return PassResult(graph_module=new, modified=True)

    @torch.no_grad()
    def _check(self, delayed: fx.GraphModule, two: TwoSizes, late: dict[fx.Node, int | None]) -> None:
        """The stream, flushed, against the whole sequences, node by node: the first that differs mixes steps."""
        inputs, steps = two.inputs[0], delayed.meta[DELAY]
        found = record(delayed, flushed(delayed.meta[STREAM], inputs, steps))
        whole = {node.name: value for node, value in two.runs[0].items()}
        length = two.sizes[0][1]
        for node in delayed.graph.nodes:
            by, dim = late.get(node), two.time_dim(node)
            if by is None or dim is None or RELATES in node.meta or node.name not in whole:
                continue
            if not whole[node.name].is_floating_point():  # masks and positions: what reads them is compared
                continue
            got = found[node].narrow(dim, by, length) if found[node].shape[dim] == length + steps else "other steps"
            if not is_close(got, whole[node.name]):
                place = owner(node) or node.name
                raise PassRefused(
                    f"delay steps: {place} ({node.target}) mixes time outside of the converted parts: in a stream that "
                    "is late it isn't the whole sequence's. Convert it too."
                )
        ends = (leaf_values(values[next(n for n in values if n.op == "output")]) for values in (found, two.runs[0]))
        for index, (got, want) in enumerate(zip(*ends, strict=True)):
            if not is_close(in_time(got, want.shape, steps), want):
                raise PassRefused(f"delay steps: output {index} of the stream isn't the whole sequence's.")


class _Rewriting:
    """One graph while it is made a stream. `late`: how many steps late each node's values come, None where a node has
    none that belong to steps.
    """

    def __init__(self, graph_module: fx.GraphModule, two: TwoSizes, signature: Signature) -> None:
        self.graph_module, self.graph, self.two = graph_module, graph_module.graph, two
        self.modules = dict(graph_module.named_modules())
        self.late: dict[fx.Node, int | None] = {}
        self.delayed: dict[fx.Node, dict[int, fx.Node]] = {}
        self.seen = self._input(signature)

    def run(self) -> int:
        """How late all outputs come."""
        for node in list(self.graph.nodes):
            if node.op == "output":
                break
            if node in self.late:
                continue
            known = [late for i in node.all_input_nodes if (late := self.late.get(i)) is not None]
            if node.name not in self.two.shapes and node.op != "call_module":
                self.late[node] = max(known, default=None) if node.target is getitem else None  # a size
            elif not known:
                self.late[node] = 0 if self.two.grows(node) else None
            else:
                self._meet(node, max(known))
        output = self.graph.output_node()
        ends = [n for n in leaf_nodes(output.args[0]) if self.late.get(n) is not None]
        total = max(self.late[n] or 0 for n in ends)
        output.args = fx.map_arg(output.args, lambda n: self._delay(n, total, output) if n in ends else n)
        return total

    def _meet(self, node: fx.Node, late: int) -> None:
        """All that a node reads, as late as the latest; and the node itself where it looks ahead."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        ahead = steps_ahead(module)
        self.late[node] = late + ahead
        self._read(node, late)
        if module is None or not getattr(module, "stateful", False) or not late + ahead:
            return
        if not getattr(module, "reads_mask", False) or len(node.args) != 1:
            raise PassRefused(
                f"delay steps: {owner(node) or node.target} carries a state behind a part that looks ahead, and can't "
                "be told which steps hold nothing yet."
            )
        if ahead:
            node.target = self._add(Streamed(module), f"{str(node.target).replace('.', '_')}_stream")
        with self.graph.inserting_before(node):
            seen, mask = self._delay(self.seen, late, node), node.kwargs.get("mask")
            if mask is not None:
                seen = self.graph.call_function(aten.logical_and.default, (seen, mask))
        node.kwargs = {**node.kwargs, "mask": seen}

    def _read(self, node: fx.Node, late: int) -> None:
        def delayed(read: fx.Node) -> fx.Node:
            return read if self.late.get(read) in (None, late) else self._delay(read, late, node)

        node.args, node.kwargs = fx.map_arg(node.args, delayed), fx.map_arg(node.kwargs, delayed)

    def _delay(self, node: fx.Node, late: int, reader: fx.Node) -> fx.Node:
        """What a node gave when it was as late as that; of what is delayed already only the rest."""
        made = self.delayed.setdefault(node, {self.late[node] or 0: node})
        if late not in made:
            before = max(steps for steps in made if steps < late)
            dim = self.two.time_dim(node)
            if dim is None:
                raise PassRefused(
                    f"delay steps: {owner(reader) or reader.name} ({reader.target}), behind a part that looks ahead, "
                    f"reads {owner(node) or node.name} ({node.target}), which doesn't come step by step."
                )
            name = self._add(Delay(late - before, dim), f"delay_{len(self.delayed)}_{late}")
            with self.graph.inserting_after(end_of_call(made[before])):
                call = self.graph.call_module(name, (made[before],))
            with self.graph.inserting_after(call):
                made[late] = self.graph.call_function(getitem, (call, 0))
            self.late[call] = self.late[made[late]] = late
        return made[late]

    def _input(self, signature: Signature) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        taken = {spec.name for spec in signature.inputs}
        with self.graph.inserting_after(last):
            seen = self.graph.placeholder(next(n for n in (SEEN, *(f"{SEEN}_{i}" for i in range(9))) if n not in taken))
        self.two.add_steps(seen)
        self.late[seen] = 0
        return seen

    def _add(self, module: nn.Module, name: str) -> str:
        while hasattr(self.graph_module, name):
            name += "_"
        self.graph_module.add_submodule(name, module)
        return name
