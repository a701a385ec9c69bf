"""What takes the place of a region that is taken out: the stream that passes by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from thesean.passes.analyse.regions import Region, is_linear_map, past_norm, same_shape, sum_of
from thesean.passes.graph.nodes import attribute, constants_of

Ends = tuple[fx.Node, fx.Node]


def removal(region: Region, gone: Mapping[fx.Node, fx.Node] | None = None) -> Ends | None:
    """(what goes, what takes its place): the sum that the region is added in and the other side of it, where the
    stream that the region reads enters a sum with it; else exit and entry; None where the shapes differ.

    Between the stream and the region may be a norm, and between the region and the sum, but no linear map. `gone` are
    earlier removals: a sum whose other branch went is the branch itself.
    """
    innermost: Ends | None = None
    end = past_norm(region.exit)
    while (joined := sum_of(end)) is not None:
        total, other = joined
        if gone is not None and gone.get(total) is end:
            end = total
            continue
        innermost = innermost or joined
        if any(_reads_lightly(region.entry, stream) for stream in _terms(other)):
            return innermost if same_shape(*innermost) else None
        end = total
    return (region.exit, region.entry) if same_shape(region.exit, region.entry) else None


def _terms(node: fx.Node) -> list[fx.Node]:
    """A node and, where it is a sum, what it adds: the stream and a branch that is added before this one."""
    return [node, *(node.all_input_nodes if node.target is torch.ops.aten.add.Tensor else [])]


def removals(regions: Iterable[Region]) -> list[Ends | None]:
    """The removal of each region, in order: where two parallel branches go, the second one takes with it the sum that
    the first one left.
    """
    found: list[Ends | None] = []
    gone: dict[fx.Node, fx.Node] = {}
    for region in regions:
        ends = removal(region, gone)
        if ends is not None:
            gone[ends[0]] = ends[1]
        found.append(ends)
    return found


def _reads_lightly(entry: fx.Node, stream: fx.Node) -> bool:
    """Whether `entry` is `stream`, or made of it alone and without a linear map."""
    front, seen, found = [entry], {entry}, False
    while front:
        node = front.pop()
        if node is stream:
            found = True
            continue
        if node.op != "call_function" or is_linear_map(node):
            return False
        for above in node.all_input_nodes:
            value = above.meta.get("val")
            if above not in seen and isinstance(value, (torch.Tensor, tuple, list)) and not constants_of(above):
                seen.add(above)
                front.append(above)
    return found


def freed_params(graph_module: fx.GraphModule, region: Region) -> int:
    """Parameters outside of the region that nothing reads once it is taken out: the norm before a branch."""
    found = removal(region)
    dead = {*region.nodes, *(found[:1] if found else ())}
    front = [i for n in dead for i in n.all_input_nodes]
    while front:
        node = front.pop()
        kept = node in dead or node.op == "placeholder" or (found is not None and node is found[1])
        if not kept and all(u in dead for u in node.users):
            dead.add(node)
            front.extend(node.all_input_nodes)
    outside = {n for n in dead if n.op == "get_attr" and not any(u in region.nodes for u in n.users)}
    tensors = {id(t): t for n in outside if isinstance(t := attribute(graph_module, str(n.target)), nn.Parameter)}
    return sum(t.numel() for t in tensors.values())
