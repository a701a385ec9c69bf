"""How long operators take, where FLOPs mislead: a model of one core in onnxruntime, without a file or a clock.

The time of a stretch is the sum over its operators of FLOPs, or of elements where there are none, by the rate of their
kind. What onnxruntime folds into the convolution before it (norms, rectifiers, sums) is free. Sizes, caches and the
cost of a call are left out: the model tells a factor of two, and a measurement (`context=`, `batch=`) tells the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from thesean.passes.analyse.regions import VIEWS
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.opaque_cells import CELLS
from thesean.passes.graph.opaque_memories import MEMORIES
from thesean.targets.shared.core import Core
from thesean.targets.shared.module import TargetModule

Kind = Literal["dense", "depthwise", "grouped", "recurrence", "elementwise"]

# Billions of FLOPs, or of elements, a second, rounded: benchmarks/results/operators.json. "grouped" is a convolution in
# groups that is not one channel in and one out, such as a depthwise one with several outputs a channel.
G_PER_S: dict[Kind, float] = {"dense": 100, "depthwise": 20, "grouped": 8, "recurrence": 30, "elementwise": 1}

_FOLDED = {
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "relu", "relu_", "hardtanh", "relu6",
    "add", "add_", "dropout", "detach", "_unsafe_view", "_to_copy", "to", "avg_pool2d",
}  # fmt: skip


def time_of_nodes(nodes: Iterable[fx.Node], flops: Mapping[fx.Node, int], numel: Callable[[fx.Node], int]) -> float:
    """Seconds of a guide's nodes, where `numel` tells the elements of a node's value."""
    work: Counter[Kind] = Counter()
    for node in nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or "constant" in node.meta:
            continue
        if node.target in VIEWS or node.target.is_view:
            continue
        if node.target in CELLS or node.target in MEMORIES:
            work["recurrence"] += flops.get(node, 0)
        elif node.target._opname.startswith("conv"):
            given = argument(node, 8 if node.target._opname == "convolution" else 6, "groups", 1)
            weight = node.args[1]
            shape = weight.meta["val"].shape if isinstance(weight, fx.Node) and "val" in weight.meta else ()
            work[_convolution(given, [int(d) for d in shape])] += flops.get(node, 0)
        elif flops.get(node, 0):
            work["dense"] += flops[node]
        elif node.target._opname not in _FOLDED and isinstance(node.meta.get("val"), torch.Tensor):
            work["elementwise"] += numel(node)
    return _seconds(work)


def time_of_module(module: nn.Module, shape: Iterable[int]) -> float | None:
    """Seconds of a module with shapes and no values, for an input of this shape. None for a recurrence, whose time is
    that of its steps and not of its FLOPs, for an attention, which a file fuses and the meta device doesn't, for what
    is not one of the families, and for one that can't run without values.
    """
    recurrent = any(isinstance(m, (Core, nn.RNNBase)) for m in module.modules())
    if not isinstance(module, TargetModule) or module.stateful or recurrent:
        return None
    counting, x = _Counting(), torch.empty(*shape, device="meta")
    try:
        with torch.no_grad(), counting:
            module.eval()(x)
    except Exception:  # whatever a family of someone else's raises: a plan goes on without a guess
        return None
    return None if counting.attends else _seconds(counting.work)


class _Counting(TorchDispatchMode):
    """Adds up the work of what runs on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[Kind] = Counter()
        self.attends = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname
        self.attends |= "softmax" in name or "scaled_dot_product" in name
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            kind: Kind = _convolution(args[8], list(args[1].shape)) if name == "convolution" else "dense"
            self.work[kind] += flops
        elif not func.is_view and func not in VIEWS and name not in _FOLDED:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            self.work["elementwise"] += first.numel() if isinstance(first, torch.Tensor) else 0
        return out


def _convolution(groups: int, weight: list[int]) -> Kind:
    """`weight` is (channels out, channels in a group, ...)."""
    if groups == 1 or len(weight) < 2:
        return "dense"
    return "depthwise" if weight[0] == groups and weight[1] == 1 else "grouped"


def _seconds(work: Mapping[Kind, int]) -> float:
    return math.fsum(amount / G_PER_S[kind] for kind, amount in work.items()) * 1e-9
