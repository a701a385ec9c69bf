"""What a region computes, in a few words read off its graph: "attention + mlp", "2 conv2d 3x3 + conv2d 1x1"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from thesean.passes.analyse.regions import Region, is_linear_map
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.opaque_memories import MEMORIES

_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "mm", "einsum"}
_ACTIVATIONS = {
    "relu", "relu_", "gelu", "silu", "silu_", "tanh", "sigmoid", "leaky_relu", "elu", "softplus", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "relu6", "prelu", "selu", "celu", "erf",
}  # fmt: skip

# heavy operators without a weight of two dimensions, or with a structure that their name says best
_OTHERS = {
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "roll", "flip", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "topk", "fft_fft", "fft_fft2", "fft_fftn", "fft_rfft", "fft_rfft2", "fft_rfftn", "fft_ifft", "fft_irfft",
    *(operator._opname for operator in MEMORIES),
}  # fmt: skip


def describe_operators(region: Region) -> str:
    """The heavy operators in order of appearance, with counts; norms, sums and views go without saying.

    Attention is a product of a softmax, with the linear maps next to it; an MLP is an activation between linear maps.
    What is left of linear maps and convolutions is counted by kind. "" for a region without any.
    """
    inside = set(region.nodes)
    order = {n: i for i, n in enumerate(region.nodes)}
    linear = {n for n in region.nodes if is_linear_map(n) and not _is_convolution(n)}
    claimed: set[fx.Node] = set()
    found: list[tuple[int, str]] = []
    for node in _attentions(region):
        near = _nearest(node, linear, inside, _inputs) | _nearest(node, linear, inside, _users)
        claimed |= near
        found.append((min(order[n] for n in {node, *near}), "attention"))
    for node in region.nodes:
        if _name(node) not in _ACTIVATIONS:
            continue
        ups, downs = (_nearest(node, linear, inside, step) - claimed for step in (_inputs, _users))
        if ups and downs:
            # a gate's other half meets it before the map down
            ups |= {u for d in downs for u in _nearest(d, linear, inside, _inputs)} - claimed
            claimed |= ups | downs
            found.append((min(order[n] for n in ups), "gated mlp" if len(ups) > len(downs) else "mlp"))
    for node in region.nodes:
        if _is_convolution(node):
            found.append((order[node], _convolution(node)))
        elif _name(node) in _OTHERS:  # before the linear maps, which a cell's matrices make it one of
            found.append((order[node], _name(node)))
        elif node in linear - claimed:
            found.append((order[node], "linear"))
        elif node.op == "call_module":  # a part that an earlier conversion replaced
            found.append((order[node], "target"))
    counts = Counter(name for _, name in sorted(found))
    return " + ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())


def attends(region: Region) -> bool:
    """Whether there is an attention in it."""
    return any(True for _ in _attentions(region))


def _attentions(region: Region) -> Iterator[fx.Node]:
    """What gives the mixed values of one."""
    inside, weighing = set(region.nodes), {n for n in region.nodes if _name(n) in _SOFTMAX | _PRODUCTS}
    return (node for node in region.nodes if _is_attention(node, weighing, inside))


def _name(node: fx.Node) -> str:
    """ "softmax" of aten.softmax.int; "gru" of an opaque operator of that name."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", "") if node.op == "call_function" else ""


def _is_attention(node: fx.Node, weighing: set[fx.Node], inside: set[fx.Node]) -> bool:
    """A fused attention, or the product that a softmax weighs: its nearest softmax or product upstream is a softmax."""
    if "scaled_dot_product" in _name(node):
        return True
    if _name(node) not in _PRODUCTS or is_linear_map(node):
        return False
    return any(_name(n) in _SOFTMAX for n in _nearest(node, weighing, inside, _inputs))


def _is_convolution(node: fx.Node) -> bool:
    return _name(node).startswith(("conv", "_conv", "mkldnn_conv"))


def _convolution(node: fx.Node) -> str:
    """ "conv2d 3x3", "depthwise conv1d 4"."""
    weight = node.args[1]
    shape = [int(d) for d in weight.meta["val"].shape] if isinstance(weight, fx.Node) else []
    kernel = shape[2:]
    groups = argument(node, 8 if _name(node) == "convolution" else 6, "groups", 1)
    depthwise = shape and groups == shape[0] > 1
    return f"{'depthwise ' if depthwise else ''}conv{len(kernel)}d {'x'.join(map(str, kernel))}"


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _users(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _nearest(
    node: fx.Node, wanted: set[fx.Node], inside: set[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """The first wanted nodes on every way from `node`, inputwards or userwards."""
    found: set[fx.Node] = set()
    seen, front = {node}, [node]
    while front:
        for other in step(front.pop()):
            if other not in inside or other in seen:
                continue
            seen.add(other)
            if other in wanted:
                found.add(other)
            else:
                front.append(other)
    return found
