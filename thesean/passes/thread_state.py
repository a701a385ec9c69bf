"""State in, state out: one graph that serves whole sequences, chunks and single steps.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.analyse.chunks import RELATES, is_close, join, split_inputs
from thesean.passes.analyse.positions import (
    Counter,
    Table,
    counters,
    running_sums,
    table_dim,
    table_rows,
    tables,
)
from thesean.passes.analyse.receptive_field import receptive_field
from thesean.passes.analyse.threaded import Threaded
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.clock import find_clock
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.nodes import leaf_nodes, leaf_values
from thesean.passes.graph.record import record
from thesean.passes.graph.resample import is_of_pairs
from thesean.passes.graph.row_counts import Shapes, give_rows, is_row_table, read_rows, select_steps, takes_rows
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.graph.stream import STREAM, delay_of
from thesean.passes.graph.surgery import beside, erase_dead

aten = torch.ops.aten

STATE_IN, STATE_OUT = "state_in_", "state_out_"

# How the names of dimensions begin that are as long as what is remembered: 0 at the start
PAST = "past"

# Long enough that a step sees some past, short enough to take one by one.
_LENGTH = 9
_BATCH = 2
# In a threaded graph's meta: the length at which it was seen to be the stateless one.
FAR = "far"
# And the constants of its positions past which that was too long to see.
UNTRIED = "untried"

# A longer window is not filled step by step: the whole network would run thousands of times.
_LONGEST_WINDOW = 64


@dataclass(frozen=True)
class ThreadState(Pass):
    """y, s = part(x)  =>  y, state_out_i = part(x, state_in_i), and positions t  =>  t + state_in_k.

    Zeros start a sequence; a dimension called "past" is 0 then. The last state, int64 of shape (batch,), counts each
    row's steps so far where the graph counts positions; of shape (1,), for all rows at once, where its positions don't
    take a batch. Before it come the running sums of what the inputs hold (a mask's visible steps), (batch,) as well.
    The output becomes a flat tuple: the guide's tensors in order, then the states. The incoming graph stays as it was;
    the new one shares its parameters. `meta["rows_are_alone"]`: a row whose states are set to zeros starts anew while
    the others go on; (1,) stays as it is.

    Raises PassRefused where chunks with state don't equal the whole sequence: it is run, step by step, and the reason
    names the first node that sees more than its own step (an attention without a cache, a bidirectional part).

    `proven`: the same graph, threaded in float32. In half precision rounding looks like mixing, and nothing is run.
    """

    in_place = False

    signature: Signature
    proven: fx.GraphModule | None = None

    @property
    def _rows(self) -> int | str:
        """The first dimension of a state."""
        return self.signature.fixed_rows or "batch"

    def requires(self, graph_module: fx.GraphModule) -> None:
        times = [s for s in self.signature.symbols if not s.startswith("batch")]
        if len(times) != 1:
            found = f"{len(times)} ({', '.join(times)})" if times else "none (dynamic= says which one is time)"
            raise PassRefused(f"thread state: expected inputs with one dynamic time dimension, found {found}.")
        if bound := next((b for b in self.signature.bounds if b.name == times[0]), None):
            raise PassRefused(
                f"thread state: the guide computes otherwise but for {bound.describe()} steps, and a stream has any "
                "number."
            )
        read = {str(n.target) for n in graph_module.graph.find_nodes(op="placeholder") if n.users}
        # an initial state that no replacement reads is none of the file's: it has states of its own
        timeless = [s.name for s in self.signature.inputs if times[0] not in s.shape and s.name in read and not s.held]
        if timeless:
            raise PassRefused(f"thread state: input {timeless[0]!r} has no time dimension, so it can't come in chunks.")
        if pairs := [s.name for s in self.signature.inputs if is_of_pairs(s.shape)]:
            raise PassRefused(f"thread state: input {pairs[0]!r} is of pairs of steps, so it can't come in chunks.")
        if not _stateful_calls(graph_module):
            raise PassRefused(
                "thread state: no part carries a state: expected causal recurrences, attentions or convolutions; what "
                "reads both ways has to read the end first. Set causal=True in its target."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        stream = graph_module.meta.get(STREAM, self.signature)
        return replace(self, signature=stream)._threaded(graph_module)

    def _threaded(self, graph_module: fx.GraphModule) -> PassResult:
        with evaluating(graph_module):
            values = self._recorded(graph_module)
            specs = self._specs(graph_module, values)
            shapes = {n.name: tuple(v.shape) for n, v in values.items() if isinstance(v, torch.Tensor)}
            if self.proven is not None:
                told = self.proven.meta
                threaded = self._thread(graph_module, specs, shapes if told["rows_are_alone"] else {})
                threaded.meta.update({key: told[key] for key in (FAR, UNTRIED, "rows_are_alone")})
                return PassResult(graph_module=threaded, modified=True)
            threaded = self._thread(graph_module, specs, shapes)
            alone = self.signature.fixed_rows == 1 or self._rows_are_alone(graph_module, threaded)
            if not alone:  # where no position can be one row's, one count serves all
                threaded = self._thread(graph_module, specs, {})
                alone = self._rows_are_alone(graph_module, threaded)
            states, length = zero_states(threaded, 1), _long_enough(graph_module)
            both = Threaded(graph_module=threaded, stateless=graph_module, signature=self.signature, states=states)
            compared = both.compare(length)
            if compared.misfit:
                raise PassRefused(f"thread state: {compared.misfit}")
            threaded.meta[FAR], threaded.meta[UNTRIED] = compared.length, compared.untried
            threaded.meta["rows_are_alone"] = alone
        return PassResult(graph_module=threaded, modified=True)

    def _thread(
        self, graph_module: fx.GraphModule, specs: dict[str, list[InputSpec]], shapes: Shapes
    ) -> fx.GraphModule:
        """`shapes`: those that were recorded, for counts of each row; none for one count."""
        new = beside(graph_module)
        graph = new.graph
        states = _States(graph)
        for call in _stateful_calls(new):
            given = [states.take(spec.dtype, spec.shape) for spec in specs[call.name]]
            single = len(given) == 1
            call.args = (*call.args, given[0] if single else tuple(given))
            with graph.inserting_after(call):
                after = graph.call_function(getitem, (call, 1))
            if single:
                states.after.append(after)
                continue
            for index in range(len(given)):
                with graph.inserting_after(after if not index else states.after[-1]):
                    states.after.append(graph.call_function(getitem, (after, index)))
        self._offset(new, states, shapes)
        new.meta["states"] = tuple(states.declared)
        old = graph.output_node()
        old.args = ((*leaf_nodes(old.args[0]), *states.after),)
        erase_dead(graph)
        new.recompile()
        new.eval()
        return new

    def _offset(self, graph_module: fx.GraphModule, states: _States, shapes: Shapes) -> None:
        """Add the steps so far to every count, and to every running sum what it has come to."""
        graph = graph_module.graph
        sums = [node for node, _ in running_sums(graph_module)]
        counted, sliced = counters(graph_module), [t for t in tables(graph_module) if t.argument is None]
        dims = {table.reader: table_dim(table, graph_module) for table in sliced}  # while the graph is readable
        for node in sums:
            so_far = states.take(torch.int64, (self._rows,))
            with graph.inserting_before(node.next):
                moved = graph.call_function(aten.add.Tensor, (node, _column(graph, so_far)))
                states.after.append(graph.call_function(aten.select.int, (moved, -1, -1)))
            node.meta[RELATES] = True
            _read_instead(node, moved)
        rows = {
            c.node
            for c in counted
            if c.slope == 1
            and c.node.name in shapes
            and takes_rows(c.node, shapes, self.signature.fixed_rows or _BATCH)
        }
        rows |= {t.reader for t in sliced if is_row_table(shapes.get(_source(t).name, ()), dims[t.reader])}
        counts: dict[bool, fx.Node] = {}
        for by_row in (True, False):
            if any((n in rows) == by_row for n in (*(c.node for c in counted), *(t.reader for t in sliced))):
                counts[by_row] = self._count(graph, states, by_row)
        for counter in counted:
            if counter.node in rows:
                with graph.inserting_before(counter.node.next):
                    moved = graph.call_function(aten.add.Tensor, (counter.node, _column(graph, counts[True])))
                give_rows(graph, counter.node, moved, shapes)
            else:
                _move(graph, counter, counts[False])
        device = torch.device(_device(graph_module))
        for table in sliced:
            by_row = table.reader in rows
            with graph.inserting_before(table.reader):
                end = table.reader.args[3]
                steps = graph.call_function(aten.arange.default, (end,), {"dtype": torch.int64, "device": device})
                so_far = _column(graph, counts[True]) if by_row else counts[False]
                moved = graph.call_function(aten.add.Tensor, (steps, so_far))
                if by_row:
                    selected = read_rows(graph, _source(table), len(shapes[_source(table).name]), moved)
                else:
                    selected = select_steps(graph, _source(table), dims[table.reader], moved)
                selected.meta = dict(table.reader.meta)
            table.reader.replace_all_uses_with(selected)
            graph.erase_node(table.reader)

    def _count(self, graph: fx.Graph, states: _States, by_row: bool) -> fx.Node:
        """A state that counts the steps so far, of each row or of all."""
        so_far = states.take(torch.int64, (self._rows,) if by_row else (1,))
        with graph.inserting_before(graph.output_node()):
            taken = find_clock(graph, self.signature).steps(graph)
            states.after.append(graph.call_function(aten.add.Tensor, (so_far, taken)))
        return so_far

    @torch.no_grad()
    def _rows_are_alone(self, stateless: fx.GraphModule, threaded: fx.GraphModule) -> bool:
        """Whether one row of two can start anew, its states zeros, while the other goes on."""
        first = max(1, _long_enough(stateless) // 3)
        chunks = (first, _long_enough(stateless) - first)
        sizes = {s: 2 if s.startswith("batch") else sum(chunks) for s in self.signature.symbols}
        inputs = self.signature.random_inputs(sizes, seed=1, device=_device(stateless))
        before, after = split_inputs(self.signature, inputs, chunks)
        try:  # rows of counts may not fit what reads them, and modules have errors of their own
            whole, anew = leaf_values(stateless(**inputs)), leaf_values(stateless(**after))
            start = threaded(**before, **zero_states(threaded, 2))
            states = dict(zip(zero_states(threaded, 2), start[len(whole) :], strict=True))
            for spec in threaded.meta["states"]:
                if spec.shape[0] == self._rows:
                    states[spec.name] = states[spec.name].clone()
                    states[spec.name][1] = 0
            end = threaded(**after, **states)
        except (RuntimeError, IndexError, ValueError):
            return False
        for index, want in enumerate(whole):
            goes_on = join([start[index][:1], end[index][:1]], want[:1].shape)
            pairs = ((goes_on, want[:1]), (end[index][1:], anew[index][1:]))
            if not all(is_close(got, wanted) for got, wanted in pairs):
                return False
        return True

    @torch.no_grad()
    def _recorded(self, graph_module: fx.GraphModule) -> dict[fx.Node, Any]:
        sizes = {s: _BATCH if s.startswith("batch") else _long_enough(graph_module) for s in self.signature.symbols}
        return record(graph_module, self.signature.random_inputs(sizes, device=_device(graph_module)))

    def _specs(self, graph_module: fx.GraphModule, values: dict[fx.Node, Any]) -> dict[str, list[InputSpec]]:
        """Dtype and shape of each part's states, by the name of its call."""
        modules = dict(graph_module.named_modules())
        specs: dict[str, list[InputSpec]] = {}
        count, rows = 0, self.signature.fixed_rows or _BATCH
        for call in _stateful_calls(graph_module):
            grows, window = (getattr(modules[str(call.target)], name, None) for name in ("grows", "window"))
            carried = values[call][1]
            specs[call.name] = []
            for state in carried if isinstance(carried, tuple) else (carried,):
                if not isinstance(state, torch.Tensor) or state.ndim == 0 or state.shape[0] != rows:
                    found = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
                    raise PassRefused(f"thread state: {call.target}: expected tensors, batch first, found {found}.")
                shape: list[int | str] = [self._rows, *map(int, state.shape[1:])]
                if grows is not None:
                    shape[grows] = PAST if window is None else f"{PAST}_of_{window}"
                specs[call.name].append(InputSpec(name=f"{STATE_IN}{count}", dtype=state.dtype, shape=tuple(shape)))
                count += 1
        return specs


class _States:
    """The states of a graph as they are added: their inputs, in a row behind the graph's own, and what they become."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.declared: list[InputSpec] = []
        self.after: list[fx.Node] = []
        self._last = graph.find_nodes(op="placeholder")[-1]

    def take(self, dtype: torch.dtype, shape: tuple[int | str, ...]) -> fx.Node:
        """The input of one more state."""
        spec = InputSpec(name=f"{STATE_IN}{len(self.declared)}", dtype=dtype, shape=shape)
        self.declared.append(spec)
        with self.graph.inserting_after(self._last):
            self._last = self.graph.placeholder(spec.name)
        return self._last


def _column(graph: fx.Graph, count_B: fx.Node) -> fx.Node:
    """(B, 1), to be added to (T,) or (B, T)."""
    column = graph.call_function(aten.unsqueeze.default, (count_B, -1))
    column.meta[RELATES] = True
    return column


def _move(graph: fx.Graph, counter: Counter, steps_so_far: fx.Node) -> None:
    """t  =>  t + slope * steps so far, for all rows alike."""
    with graph.inserting_before(counter.node.next):
        offset = steps_so_far
        if counter.slope != 1:
            slope = int(counter.slope) if counter.slope.is_integer() else counter.slope
            offset = graph.call_function(aten.mul.Tensor, (offset, slope))
            offset.meta[RELATES] = True
        moved = graph.call_function(aten.add.Tensor, (counter.node, offset))
        moved.meta = {k: v for k, v in counter.node.meta.items() if k in ("val", "nn_module_stack")}
    _read_instead(counter.node, moved)


def _read_instead(node: fx.Node, moved: fx.Node) -> None:
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)


def _source(table: Table) -> fx.Node:
    source = table.reader.args[0]
    assert isinstance(source, fx.Node)
    return source


def _long_enough(graph_module: fx.GraphModule) -> int:
    """Steps in which a kernel that looks far along time is seen, and a window is filled unless it is a long one."""
    windows = [w for m in graph_module.modules() if (w := getattr(m, "window", None)) and isinstance(w, int)]
    filled = max((w for w in windows if w <= _LONGEST_WINDOW), default=0)
    length = max(_LENGTH, receptive_field(graph_module.graph) + 2, filled + 2) + delay_of(graph_module)
    return min(length, table_rows(graph_module) or length)


def zero_states(threaded: fx.GraphModule, batch: int) -> dict[str, torch.Tensor]:
    """The states that start `batch` sequences, by name."""
    return {
        spec.name: torch.zeros(state_shape(spec.shape, batch, 0), dtype=spec.dtype, device=_device(threaded))
        for spec in threaded.meta["states"]
    }


def state_shape(shape: Sequence[int | str], batch: int, past: int) -> list[int]:
    """Of a state in which `past` steps are remembered."""
    return [d if isinstance(d, int) else past if d.startswith(PAST) else batch for d in shape]


def _stateful_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Calls of modules that carry a state and aren't given one: it comes behind the tensors that they read."""
    modules: dict[str, nn.Module] = dict(graph_module.named_modules())
    return [
        call
        for call in graph_module.graph.find_nodes(op="call_module")
        if getattr(module := modules.get(str(call.target)), "stateful", False)
        and len(call.args) == getattr(module, "reads", 1)
    ]


def _device(graph_module: fx.GraphModule) -> str:
    return str(next((p.device for p in graph_module.parameters()), torch.device("cpu")))
