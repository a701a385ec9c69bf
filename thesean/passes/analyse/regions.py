"""Single-entry single-exit regions: what can be cut out and replaced by one module.

A region is (entry, exit]: all main nodes on paths from `entry`, exclusive, to `exit`, inclusive. Data comes in only
through `entry` (side inputs aside) and leaves only through `exit`.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from thesean.errors import PassRefused
from thesean.passes.analyse.dataflow import SOURCE, DataFlow
from thesean.passes.graph.nodes import argument, calls_of, constants_of, owner
from thesean.passes.graph.opaque_memories import MEMORIES

aten = torch.ops.aten


# move or rename values without computing
VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.contiguous.default, aten.clone.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.t.default, aten.flatten.using_ints,
    aten._unsafe_view.default, aten.alias.default, aten.select.int, aten.cat.default,
    aten.detach.default,
}  # fmt: skip


def shared_path(nodes: Iterable[fx.Node]) -> str:
    """The longest path that all of these nodes with an owner share, of a module that is called where there is one."""
    owned = [n for n in nodes if owner(n)]
    split = [owner(n).split(".") for n in owned]
    shared = [names[0] for names in itertools.takewhile(lambda n: len(set(n)) == 1, zip(*split, strict=False))]
    called = set(calls_of(owned[0])) if owned else set()
    depth = next((d for d in range(len(shared), 0, -1) if ".".join(shared[:d]) in called), len(shared))
    return ".".join(shared[:depth])  # a list of modules is never called: its holder is the block


_SIZES = (int, float, torch.SymInt, torch.SymFloat)


@dataclass(frozen=True, kw_only=True)
class Region:
    """Main nodes in topological order; the last one is `exit`."""

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    name: str = field(default="", compare=False)  # the module that it was found as
    shares: bool = False  # whether what is outside reads values inside too, which stay when the region is cut out

    @cached_property
    def gone(self) -> tuple[fx.Node, ...]:
        """What nothing reads once it is cut out."""
        if not self.shares:
            return self.nodes
        gone = {self.exit}
        for node in reversed(self.nodes):
            readers = [u for u in node.users if not isinstance(u.meta.get("val"), _SIZES)]
            if all(user in gone for user in readers):
                gone.add(node)
        return tuple(n for n in self.nodes if n in gone)

    def path(self) -> str:
        """The module that it was found as, or else the longest module path that all nodes with an owner share; views,
        which compute nothing, don't count.
        """
        return self.name or shared_path(n for n in self.nodes if n.target not in VIEWS) or shared_path(self.nodes)

    def is_heavy(self) -> bool:
        """Holds a linear map with parameters (a matrix product or a convolution, not a norm or a table), or mixes over
        time without one.
        """
        return any(is_work(n) for n in self.nodes)

    def translate(self, by_name: dict[str, fx.Node]) -> Region:
        """The same region in a copy of the graph; `by_name` maps this graph's names to the copy's nodes."""
        return Region(
            entry=by_name[self.entry.name],
            exit=by_name[self.exit.name],
            nodes=tuple(by_name[n.name] for n in self.nodes),
            name=self.name,
            shares=self.shares,
        )

    def is_fork(self) -> bool:
        """Has parallel paths, such as a residual connection."""
        return sum(isinstance(n.meta.get("val"), torch.Tensor) for n in self.nodes) > 1

    def is_residual(self) -> bool:
        """entry + f(entry), with linear maps in f."""
        return self.exit.target is aten.add.Tensor and self.entry in self.exit.all_input_nodes and self.is_heavy()


_PRODUCTS = {
    "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "mv", "addmv", "einsum", "bilinear", "_trilinear",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "_convolution", "lstm", "gru", "rnn_tanh", "rnn_relu",
}  # fmt: skip


def is_linear_map(node: fx.Node) -> bool:
    """A product with a parameter of two dimensions or more, however that is viewed, cast or picked from a bank."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._opname not in _PRODUCTS:
        return False
    return any(_is_matrix(i) for i in node.all_input_nodes)


def _is_matrix(node: fx.Node) -> bool:
    while node.target in VIEWS or node.target in _PICKS:
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return any(getattr(n.meta.get("val"), "ndim", 0) >= 2 for n in constants_of(node))


_PICKS = {aten.index.Tensor, aten.index_select.default, aten.to.dtype, aten._to_copy.default, aten.numpy_T.default}


def is_work(node: fx.Node) -> bool:
    """What a part is cut out for: a linear map, or mixing over time without a matrix."""
    return is_linear_map(node) or _mixes_alone(node)


_RUNNING = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "roll", "flip", "sort"}
_POOLS = {"avg_pool1d", "max_pool1d", "max_pool1d_with_indices"}


def _mixes_alone(node: fx.Node) -> bool:
    """A Fourier transform, a pool of neighbours, or a running sum, an order or a shift along the second dimension of
    (batch, time, width).
    """
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(node.target, torch._ops.OpOverload) or getattr(value, "ndim", 0) != 3:
        return False
    name = node.target._opname
    if name == "slice":
        return any(_mixes_alone(user) for user in node.users)
    if name.startswith("fft_") and "shift" not in name:
        return True
    if name in _POOLS:
        return any(same_shape(node, i) for i in node.all_input_nodes)  # strided ones choose steps, and are no mixing
    if name in ("pad", "constant_pad_nd") and _is_shift(argument(node, 1, "pad")):
        return True
    if name in _RUNNING:
        dims = argument(node, 2 if name == "roll" else 1, "dims" if name in ("roll", "flip") else "dim")
    elif name in ("cat", "pad", "constant_pad_nd"):  # a shift: what it reads lost its first or last steps
        read = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:1]
        cut = [i for i in read if isinstance(i, fx.Node) and i.target is aten.slice.Tensor]
        dims = [argument(i, 1, "dim", 0) for i in cut if same_shape(node, i.all_input_nodes[0])]
    else:
        return False
    return any(isinstance(d, int) and d % 3 == 1 for d in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _is_shift(pad: Any) -> bool:
    """Whether as many steps of (batch, time, width) are cut off at one end as are put on at the other."""
    steps = list(pad)[2:] if isinstance(pad, (list, tuple)) else []
    return len(steps) == 2 and all(isinstance(n, int) for n in steps) and steps[0] == -steps[1] != 0


def is_single_entry_single_exit(flow: DataFlow, region: Region) -> bool:
    """Edges enter only from `entry` and leave only from `exit`, or where it `shares` from what stays."""
    inside = set(region.nodes)
    for node in region.nodes:
        if any(p not in inside and p is not region.entry for p in flow.dag.predecessors(node)):
            return False
        leaves = node is not region.exit and any(s not in inside for s in flow.dag.successors(node))
        if leaves and not region.shares:
            return False
    return region.exit in inside


def check_region(graph_module: fx.GraphModule, region: Region, flow: DataFlow, path: str) -> None:
    """What can be cut out. Raises PassRefused for a region of another graph, or with more than one entry or exit.

    `flow` is the graph's, and may be older than the cuts that were made elsewhere in it.
    """
    if region.exit.graph is not graph_module.graph:
        raise PassRefused(f"{path}: the region belongs to another graph. Plan again for this one.")
    if not is_single_entry_single_exit(flow, region):
        raise PassRefused(f"{path}: expected one entry and one exit, found more. Split it with parts=[...].")


def remembers(region: Region) -> bool:
    """Whether it carries a memory of fixed size, by a recurrence of matrices."""
    return any(node.target in MEMORIES for node in region.nodes)


def join_of(region: Region) -> tuple[fx.Node, fx.Node] | None:
    """(sum, stream) where the exit's only use is `stream + exit`."""
    return sum_of(region.exit)


def is_branch(region: Region) -> bool:
    """Whether what the region gives is added to a residual stream, through a norm or as it is."""
    return sum_of(past_norm(region.exit)) is not None


def sum_of(branch: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(sum, other) where a node's only use is the sum of it and another one, which enters as it is."""
    users = list(branch.users)
    if len(users) != 1 or users[0].target not in (aten.add.Tensor, aten.add_.Tensor):
        return None
    others = [a for a in users[0].args[:2] if a is not branch]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    if users[0].kwargs.get("alpha", 1) != 1 and users[0].args[1] is others[0]:
        return None
    stream, have = others[0].meta.get("val"), branch.meta.get("val")
    same = isinstance(stream, torch.Tensor) and isinstance(have, torch.Tensor) and stream.ndim == have.ndim
    return (users[0], others[0]) if same else None


_NORMS = {"layer_norm", "rms_norm", "group_norm", "native_layer_norm", "mean", "var", "var_mean", "linalg_vector_norm"}


def past_norm(end: fx.Node) -> fx.Node:
    """The result of the norm that alone reads a node, as a branch has it whose output is normed before it is added; the
    node itself where there is none.
    """
    inside, front = {end}, [end]
    while front:
        for user in front.pop().users:
            known = all(i in inside or i.op == "get_attr" or "constant" in i.meta for i in user.all_input_nodes)
            if user not in inside and known and user.op == "call_function" and not is_linear_map(user):
                inside.add(user)
                front.extend(inside)  # a node may have waited for this one
    read_outside = [n for n in inside if any(u not in inside for u in n.users)]
    is_norm = any(isinstance(n.target, torch._ops.OpOverload) and n.target._opname in _NORMS for n in inside - {end})
    return read_outside[0] if is_norm and len(read_outside) == 1 else end


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Both are tensors of the same symbolic shape."""
    first, second = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and [str(s) for s in first.shape] == [str(s) for s in second.shape]
    )


def span(flow: DataFlow, first: Region, last: Region) -> Region | None:
    """One region from the entry of `first` to the exit of `last`, with all between; None unless it is single-entry."""
    inside = {last.exit}
    front = [last.exit]
    while front:
        for above in flow.dag.predecessors(front.pop()):
            if above is first.entry or above in inside:
                continue
            if isinstance(above, str) or flow.order[above] < flow.order[first.entry]:
                return None
            inside.add(above)
            front.append(above)
    nodes = tuple(sorted(inside, key=flow.order.__getitem__))
    region = Region(entry=first.entry, exit=last.exit, nodes=nodes)
    return region if is_single_entry_single_exit(flow, region) else None


def join(first: Region, last: Region, between: list[Region]) -> Region:
    """Neighbouring segments as one region."""
    nodes = tuple(n for r in [first, *between, *([last] if last is not first else [])] for n in r.nodes)
    return Region(entry=first.entry, exit=last.exit, nodes=nodes)


def module_regions(flow: DataFlow) -> dict[str, Region]:
    """Module path -> its region, for every module of the guide whose nodes form one; path#2 for its second call."""
    members: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node in flow.order:
        if node not in flow.dag or node is flow.sink:
            continue
        names = owner(node).split(".") if owner(node) else []
        calls = calls_of(node)
        for depth in range(1, len(names) + 1):
            path = ".".join(names[:depth])
            members[path, calls.get(path, "")].append(node)
    found = {}
    taken: Counter[str] = Counter()
    for (path, _), nodes in members.items():
        inside = set(nodes)
        entries = {p for n in nodes for p in flow.dag.predecessors(n) if p not in inside}
        exits = [n for n in nodes if any(s not in inside for s in flow.dag.successors(n))]
        taken[path] += 1
        if len(entries) == 1 and len(exits) == 1 and SOURCE not in entries:
            region = Region(entry=entries.pop(), exit=exits[0], nodes=tuple(nodes))
            carries = all(isinstance(n.meta.get("val"), torch.Tensor) for n in (region.entry, region.exit))
            if carries and is_single_entry_single_exit(flow, region):
                found[path if taken[path] == 1 else f"{path}#{taken[path]}"] = region
    return found
