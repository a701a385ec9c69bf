"""Which dimension of a (batch, ?, ?) tensor is time: what convolutions and recurrences read tells it, else numbers.

B batch, C channels, T time
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.regions import Region
from thesean.passes.graph.record import Recorded, evaluate

aten = torch.ops.aten

# read (batch, channels, time) as such
_CHANNELS_FIRST = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default, aten.batch_norm.default,
    aten.group_norm.default, aten.instance_norm.default, aten.max_pool1d.default, aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_max_pool1d.default,
    aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.reflection_pad1d.default,
    aten.replication_pad1d.default, aten.max_pool1d_with_indices.default,
}  # fmt: skip
# read or make (batch, time, width) as such
_TIME_FIRST = {
    aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.embedding.default,
}  # fmt: skip
# after these the layout is another, or a matrix read the last dimension as its width, which either may be
_RELAYING = {
    aten.permute.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.rms_norm.default, aten.select.int,
    aten.mean.dim, aten.bmm.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten._unsafe_view.default, aten.numpy_T.default, aten.mT.default, aten.movedim.int,
    aten.addmm.default, aten.einsum.default,
}  # fmt: skip

# Of the output's largest change: rounding moves others by 1e-7, mixing by 1e-3 and more.
_MOVED = 1e-5


def is_channels_first(region: Region, values: dict[fx.Node, Any] | None = None) -> bool:
    """(batch, channels, time) in. A convolution or a norm over channels that reads the entry in its own layout says so,
    inside the region or along the stream that it is cut out of; so does a dynamic last dimension.

    Where nothing does and both dimensions are fixed, `values` (recorded on small inputs) are moved one place at a time:
    along time places reach their neighbours or what follows, across channels all or none.
    """
    value = region.entry.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim != 3:
        return False
    dynamic = [isinstance(d, torch.SymInt) for d in value.shape[1:]]
    if dynamic == [False, True]:
        return True
    if any(n.target in _CHANNELS_FIRST for n in region.entry.graph.nodes):
        told = _reading(region.entry, set(region.nodes))
        told = told if told is not None else _reading(region.entry, None)
        if told is not None:
            return told
    if any(dynamic) or values is None:
        return False
    findings = values.findings if isinstance(values, Recorded) else {}
    key = ("channels first", region.entry, region.exit)
    if key not in findings:
        findings[key] = _in_order(region, values, 2) and not _in_order(region, values, 1)
    return bool(findings[key])


def _reading(start: fx.Node, inside: set[fx.Node] | None) -> bool | None:
    """Whether the nearest operator that tells reads `start` channels first; None where none tells.

    Followed through operators that keep the layout: `inside` a region towards its exit, else along the whole graph and
    both ways. Turned round by transpose(1, 2), the answer is the other one.
    """
    front: list[tuple[fx.Node, bool]] = [(start, False)]
    seen = {start}
    for node, turned in front:  # breadth first: it grows
        if inside is None and node.target in _CHANNELS_FIRST | _TIME_FIRST:
            return (node.target in _CHANNELS_FIRST) != turned
        for user in node.users:
            if user in seen or (inside is not None and user not in inside) or not _is_3d(user):
                continue
            if user.target in _CHANNELS_FIRST | _TIME_FIRST and user.args[:1] == (node,):
                return (user.target in _CHANNELS_FIRST) != turned
            if user.target in _CHANNELS_FIRST | _TIME_FIRST:
                continue
            if _swaps(user):
                seen.add(user)
                front.append((user, not turned))
            elif _keeps(user):
                seen.add(user)
                front.append((user, turned))
        if inside is not None:
            continue
        for above in node.all_input_nodes if _swaps(node) or _keeps(node) else ():
            if above not in seen and _is_3d(above) and above.op != "get_attr":
                seen.add(above)
                front.append((above, turned != _swaps(node)))
    return None


def _is_3d(node: fx.Node) -> bool:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return getattr(value, "ndim", 0) == 3


def _keeps(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in _RELAYING and node.target is not aten.transpose.int


def _swaps(node: fx.Node) -> bool:
    """transpose(1, 2), or permute(0, 2, 1)."""
    if node.target is aten.permute.default:
        dims = node.args[1]
        return isinstance(dims, (list, tuple)) and [d % 3 for d in dims if isinstance(d, int)] == [0, 2, 1]
    if node.target is aten.transpose.int:
        return {d % 3 for d in node.args[1:3] if isinstance(d, int)} == {1, 2}
    return False


def _in_order(region: Region, values: dict[fx.Node, Any], axis: int) -> bool:
    """Whether a place along the axis reaches only places near it, or only those after or before it, and not itself
    alone: and its neighbour reaches the same, one further on.
    """
    x, y = values[region.entry], values[region.exit]
    if y.ndim != 3 or y.shape[axis] != x.shape[axis] or x.shape[axis] < 4:
        return False
    middle = x.shape[axis] // 2
    first, second = (_reached(region, values, axis, at) for at in (middle - 1, middle))
    if not first or not second or first == [middle - 1]:
        return False
    end = x.shape[axis] - 1
    contiguous = all(r == list(range(r[0], r[-1] + 1)) for r in (first, second))
    starts = second[0] == first[0] + 1 or first[0] == second[0] == 0
    ends = second[-1] == first[-1] + 1 or first[-1] == second[-1] == end
    return contiguous and starts and ends and first != second


@torch.no_grad()
def _reached(region: Region, values: dict[fx.Node, Any], axis: int, at: int) -> list[int]:
    """The places along the axis whose output moves with the input at one of them."""
    x, y = values[region.entry], values[region.exit]
    moved = x.clone()
    place = moved.select(axis, at)
    noise = torch.randn(place.shape, generator=torch.Generator().manual_seed(0)).to(x)
    place.add_(noise * x.std().clamp_min(1e-3))
    change = (evaluate(region.nodes, values, {region.entry: moved}, region.exit) - y).abs()
    change = change.amax([d for d in range(3) if d != axis])
    return [int(i) for i in (change > _MOVED * change.max()).nonzero().flatten()]
