"""State in, state out: one graph that serves whole sequences, chunks and single steps.

B batch, T time
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import Difference, join, run_in_chunks, same_in_chunks
from thesean.passes.analyse.positions import (
    Counter,
    Table,
    counters,
    table_dim,
    table_rows,
    tables,
)
from thesean.passes.analyse.receptive_field import receptive_field
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import leaf_nodes, owner
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten

STATE_IN, STATE_OUT = "state_in_", "state_out_"

# Long enough that a step sees some past, short enough to take one by one.
_LENGTH = 9
_BATCH = 2

# Of an output's scale, where rounding is coarser than float32's
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ThreadState(Pass):
    """y, s = part(x)  =>  y, state_out_i = part(x, state_in_i), and positions t  =>  t + state_in_k.

    The last state, int64 of shape (1,), counts the steps so far; it exists where the graph counts positions. Zeros
    start a sequence. The output becomes a flat tuple: the guide's tensors in order, then the states. The incoming
    graph stays as it was; the new one shares its parameters.

    Raises PassRefused where chunks with state don't equal the whole sequence: it is run, step by step, and the reason
    names the first node that sees more than its own step (an attention that was kept, a bidirectional part).
    """

    in_place = False

    signature: Signature

    def requires(self, graph_module: fx.GraphModule) -> None:
        times = [s for s in self.signature.symbols if not s.startswith("batch")]
        if len(times) != 1:
            found = f"{len(times)} ({', '.join(times)})" if times else "none"
            raise PassRefused(f"thread state: expected inputs with one dynamic time dimension, found {found}.")
        read = {str(n.target) for n in graph_module.graph.find_nodes(op="placeholder") if n.users}
        # an initial state that no replacement reads is none of the file's: it has states of its own
        timeless = [s.name for s in self.signature.inputs if times[0] not in s.shape and s.name in read]
        if timeless:
            raise PassRefused(f"thread state: input {timeless[0]!r} has no time dimension, so it can't come in chunks.")
        if not _stateful_calls(graph_module):
            raise PassRefused(
                "thread state: no part carries a state: expected causal recurrences; a bidirectional one has to read "
                "the end first. Set causal=True in its target."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        with evaluating(graph_module):
            threaded = self._thread(graph_module, self._specs(graph_module))
            self._check(graph_module, threaded)
        return PassResult(graph_module=threaded, modified=True)

    def _thread(self, graph_module: fx.GraphModule, specs: dict[str, list[InputSpec]]) -> fx.GraphModule:
        graph = fx.Graph()
        output = graph.graph_copy(graph_module.graph, {})
        graph.output(output)
        erase_dead(graph)
        new = fx.GraphModule(graph_module, graph)
        new.meta.update(graph_module.meta)
        last = graph.find_nodes(op="placeholder")[-1]
        states: list[fx.Node] = []
        declared: list[InputSpec] = []
        for call in _stateful_calls(new):
            given: list[fx.Node] = []
            for spec in specs[call.name]:
                with graph.inserting_after(last):
                    last = graph.placeholder(spec.name)
                given.append(last)
            declared.extend(specs[call.name])
            single = len(given) == 1
            call.args = (call.args[0], given[0] if single else tuple(given))
            with graph.inserting_after(call):
                after = graph.call_function(getitem, (call, 1))
            if single:
                states.append(after)
                continue
            for index in range(len(given)):
                with graph.inserting_after(after if not index else states[-1]):
                    states.append(graph.call_function(getitem, (after, index)))
        counted, sliced = counters(new), [t for t in tables(new) if t.argument is None]
        if counted or sliced:
            declared.append(InputSpec(name=f"{STATE_IN}{len(states)}", dtype=torch.int64, shape=(1,)))
            with graph.inserting_after(last):
                last = graph.placeholder(declared[-1].name)
            states.append(self._offset(new, last, counted, sliced))
        new.meta["states"] = tuple(declared)
        old = graph.output_node()
        flat = (*leaf_nodes(old.args[0]), *states)
        old.args = (flat,)
        erase_dead(graph)
        new.recompile()
        new.eval()
        return new

    def _offset(
        self, graph_module: fx.GraphModule, steps_so_far: fx.Node, counted: list[Counter], sliced: list[Table]
    ) -> fx.Node:
        """Add the steps so far to every count; returns the node that holds them after this chunk."""
        graph = graph_module.graph
        device = torch.device(_device(graph_module))
        dims = {table.reader: table_dim(table, graph_module) for table in sliced}  # while the graph is readable
        for counter in counted:
            with graph.inserting_before(counter.node.next):
                offset = steps_so_far
                if counter.slope != 1:
                    slope = int(counter.slope) if counter.slope.is_integer() else counter.slope
                    offset = graph.call_function(aten.mul.Tensor, (offset, slope))
                moved = graph.call_function(aten.add.Tensor, (counter.node, offset))
                moved.meta = {k: v for k, v in counter.node.meta.items() if k in ("val", "nn_module_stack")}
            for user in [u for u in counter.node.users if u is not moved]:
                user.replace_input_with(counter.node, moved)
        for table in sliced:
            reader = table.reader
            source, end = reader.args[0], reader.args[3]
            with graph.inserting_before(reader):
                steps = graph.call_function(aten.arange.default, (end,), {"dtype": torch.int64, "device": device})
                moved = graph.call_function(aten.add.Tensor, (steps, steps_so_far))
                selected = graph.call_function(aten.index_select.default, (source, dims[reader], moved))
                selected.meta = dict(reader.meta)
            reader.replace_all_uses_with(selected)
            graph.erase_node(reader)
        clock, dim = next(
            (node, spec.shape.index(size))
            for spec, node in zip(self.signature.inputs, graph.find_nodes(op="placeholder"), strict=False)
            for size in spec.shape
            if isinstance(size, str) and not size.startswith("batch")
        )
        with graph.inserting_before(graph.output_node()):
            taken = graph.call_function(aten.sym_size.int, (clock, dim))
            return graph.call_function(aten.add.Tensor, (steps_so_far, taken))

    @torch.no_grad()
    def _check(self, stateless: fx.GraphModule, threaded: fx.GraphModule) -> None:
        """Single steps with state against the stateless graph on the whole sequence, node by node."""
        length = _long_enough(stateless)
        # rows would interleave where a node flattens batch and time
        sizes = {s: 1 if s.startswith("batch") else length for s in self.signature.symbols}
        inputs = self.signature.random_inputs(sizes, device=_device(stateless))
        states = zero_states(threaded, 1)
        chunks = (1,) * length
        difference = same_in_chunks(threaded, self.signature, inputs, states, chunks)
        if difference is not None:
            raise PassRefused(f"thread state: {_describe(threaded, difference)}")
        pieces, _ = run_in_chunks(threaded, self.signature, inputs, states, chunks)
        for index, whole in enumerate(leaf_values(stateless(**inputs))):
            got = join([piece[index] for piece in pieces], whole.shape)
            scale = max(1.0, whole.abs().max().item())
            bound = _CLOSE.get(whole.dtype, 1e-4) * scale
            if isinstance(got, str) or not torch.allclose(got, whole, rtol=0, atol=bound):
                raise PassRefused(f"thread state: output {index} of single steps isn't the whole sequence's.")

    def _specs(self, graph_module: fx.GraphModule) -> dict[str, list[InputSpec]]:
        """Dtype and shape of each part's states, by the name of its call."""
        length = _long_enough(graph_module)
        sizes = {s: _BATCH if s.startswith("batch") else length for s in self.signature.symbols}
        values = record(graph_module, self.signature.random_inputs(sizes, device=_device(graph_module)))
        specs: dict[str, list[InputSpec]] = {}
        count = 0
        for call in _stateful_calls(graph_module):
            carried = values[call][1]
            specs[call.name] = []
            for state in carried if isinstance(carried, tuple) else (carried,):
                if not isinstance(state, torch.Tensor) or state.ndim == 0 or state.shape[0] != _BATCH:
                    found = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
                    raise PassRefused(f"thread state: {call.target}: expected tensors, batch first, found {found}.")
                shape: tuple[int | str, ...] = ("batch", *map(int, state.shape[1:]))
                specs[call.name].append(InputSpec(name=f"{STATE_IN}{count}", dtype=state.dtype, shape=shape))
                count += 1
        return specs


def _long_enough(graph_module: fx.GraphModule) -> int:
    """Steps in which a kernel that looks far along time is seen."""
    length = max(_LENGTH, receptive_field(graph_module.graph) + 2)
    return min(length, table_rows(graph_module) or length)


def zero_states(threaded: fx.GraphModule, batch: int) -> dict[str, torch.Tensor]:
    """The states that start `batch` sequences, by name."""
    return {
        spec.name: torch.zeros(
            [batch if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype, device=_device(threaded)
        )
        for spec in threaded.meta["states"]
    }


def leaf_values(output: Any) -> list[torch.Tensor]:
    """The tensors of a nested output, in order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


def _stateful_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Calls of modules that carry a state and aren't given one."""
    modules: dict[str, nn.Module] = dict(graph_module.named_modules())
    calls = graph_module.graph.find_nodes(op="call_module")
    return [n for n in calls if getattr(modules.get(str(n.target)), "stateful", False) and len(n.args) == 1]


def _describe(graph_module: fx.GraphModule, difference: Difference) -> str:
    node = next(n for n in graph_module.graph.nodes if n.name == difference.node)
    if node.op == "call_module":
        return (
            f"part {node.target!r} needs the whole sequence ({difference.what}); it is not a causal recurrence. "
            "A sequence target with causal=True is one."
        )
    place = owner(node) or node.name
    return f"{place} ({node.target}) mixes time outside of the converted parts ({difference.what}). Convert it too."


def _device(graph_module: fx.GraphModule) -> str:
    return str(next((p.device for p in graph_module.parameters()), torch.device("cpu")))
