"""A graph's own constants, such as the device of what it makes anew, follow its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from thesean.kernels.shared.precision import HALF
from thesean.passes.cast_floats import CastFloats, cast_signature
from thesean.passes.graph.modes import evaluating, usual_settings
from thesean.passes.graph.nodes import attribute
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import Signature

aten = torch.ops.aten

_SIZES = {"batch": 2, "time": 5}


def constants_as_buffers(network: fx.GraphModule) -> fx.GraphModule:
    """Tensors that tracing left as plain attributes become buffers, in place, to be saved and moved as such."""
    tensors = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    named = {name for name, _ in tensors}
    for node in network.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        value = attribute(network, path)
        if path not in named and isinstance(value, torch.Tensor):
            holder, _, leaf = path.rpartition(".")
            owner = network.get_submodule(holder)
            delattr(owner, leaf)
            owner.register_buffer(leaf, value)
    return network


@dataclass(frozen=True)
class Place:
    """Where a network's weights are, and in which precision."""

    device: torch.device | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, network: nn.Module) -> Place:
        """By its first weight."""
        first = next((p for p in network.parameters() if p.is_floating_point()), None)
        return cls(None, None) if first is None else cls(first.device, first.dtype)


class Following:
    """What has to be known of a graph before its weights are moved or cast by `fn`."""

    def __init__(self, network: fx.GraphModule, signature: Signature, fn: Callable[[torch.Tensor], torch.Tensor]):
        self.network, self.signature, self.before = network, signature, Place.of(network)
        self.counting: dict[fx.Node, bool] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        at, old = self.before.device, self.before.dtype
        if at is None or old != torch.float32 or at.type == "meta":
            return
        if fn(torch.zeros(1, dtype=old, device=at)).dtype in HALF:
            self.counting = counting_nodes(network, signature)
            self.buffers = {
                str(n.target): attribute(network, str(n.target)) for n in self.counting if n.op == "get_attr"
            }

    def finish(self) -> Signature:
        """The graph in its new place, and what it takes there."""
        after = Place.of(self.network)
        if after.device is not None:
            _move(self.network, after.device)
        old, new = self.before.dtype, after.dtype
        if old is None or new is None or old == new:
            return self.signature
        kept = {node: (node.args, node.kwargs) for node in self.counting}
        CastFloats({old: new})(self.network)
        for node, given in kept.items():
            node.args, node.kwargs = given
        for path, value in self.buffers.items():
            holder, _, leaf = path.rpartition(".")
            self.network.get_submodule(holder)._buffers[leaf] = value.to(after.device)
        self._cast_where_counting_ends(new)
        self.network.recompile()
        return cast_signature(self.signature, {old: new})

    def _cast_where_counting_ends(self, dtype: torch.dtype) -> None:
        graph, most = self.network.graph, torch.finfo(dtype).max
        for node, is_float in self.counting.items():
            readers = [user for user in node.users if user not in self.counting and user.op != "output"]
            if not is_float or not readers:
                continue
            with graph.inserting_after(node):
                near = graph.call_function(aten.clamp.default, (node, -most, most))  # a mask's least number
            with graph.inserting_after(near):
                cast = graph.call_function(aten.to.dtype, (near, dtype))
            for user in readers:
                user.replace_input_with(node, cast)


def counting_nodes(network: fx.GraphModule, signature: Signature) -> dict[fx.Node, bool]:
    """What is made of sizes, whole numbers and constants alone, positions and masks that is, and whether it is a float:
    past 256 bfloat16 has no number for each position, so that these stay as they are.
    """
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    floats = {spec.name for spec in signature.inputs if spec.dtype.is_floating_point}
    reached: set[fx.Node] = set()
    for node in network.graph.nodes:
        sized = node.target is aten.sym_size.int
        given = node.op == "call_module" or str(node.target) in (weights if node.op == "get_attr" else floats)
        if not sized and (given or any(n in reached for n in node.all_input_nodes)):
            reached.add(node)
    sizes = {s: _SIZES["batch" if s.startswith("batch") else "time"] for s in signature.symbols}
    sizes = signature.within({**sizes, **signature.example_sizes})
    device = next((str(p.device) for p in network.parameters()), "cpu")
    try:
        with usual_settings(), evaluating(network):
            values = record(network, signature.random_inputs(sizes, device=device))
    except (RuntimeError, IndexError, ValueError):
        return {}  # it doesn't run where it is: all of it is cast alike
    nodes = [n for n in network.graph.nodes if n not in reached and n.op not in ("placeholder", "output")]
    return {n: isinstance(v := values[n], torch.Tensor) and v.is_floating_point() for n in nodes}


def _move(network: fx.GraphModule, device: torch.device) -> None:
    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    changed = False
    for node in network.graph.nodes:
        given = map_aggregate(node.args, there), map_aggregate(node.kwargs, there)
        if given != (node.args, node.kwargs):
            node.args, node.kwargs = given
            changed = True
    if changed:
        network.recompile()
