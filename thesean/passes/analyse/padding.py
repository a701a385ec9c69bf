"""Find the masks that hide padded steps, and what their values mean, by what they do to the numbers.

A mask stands in the graph with its causal half, turned to booleans or to minus infinity, one to a layer or one for all.
What it is called says nothing either. So every value of shape (batch, time) on the side of a mixing operator is tried:
where a value hides step s from every other step, and another one shows it, it is a mask, and we know how to read it.

B batch, T time, S steps that are looked at
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from thesean.passes.analyse.dataflow import DataFlow, is_size_only, valued_inputs
from thesean.passes.analyse.float_masks import HIDES
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.nodes import above
from thesean.passes.graph.record import evaluate_all

aten = torch.ops.aten

# how a mask says that a step holds a token
Rule = Literal["true", "false", "one", "zero", "additive"]

# Of the output's largest change: rounding moves other steps by 1e-7, one that is seen by 1e-3 and more.
_MOVED = 1e-5


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The name of the node that holds a mask of shape (B, T), and how it is read. Names outlive copies of a graph."""

    node: str
    rule: Rule

    def seen(self, value_BT: torch.Tensor) -> torch.Tensor:
        """Booleans, True where there is a token."""
        operator = READERS[self.rule]
        return value_BT if operator is None else operator[0](value_BT, *operator[1])

    def all_seen(self, like_BT: torch.Tensor) -> torch.Tensor:
        """A mask that hides nothing."""
        return torch.full_like(like_BT, _VALUES[self.rule][0])


# rule -> the operator that makes booleans of a mask, and its arguments past the mask; None where it holds them
READERS: dict[Rule, tuple[Any, tuple[float, ...]] | None] = {
    "true": None,
    "false": (aten.logical_not.default, ()),
    "one": (aten.ne.Scalar, (0,)),
    "zero": (aten.eq.Scalar, (0,)),
    "additive": (aten.gt.Scalar, (HIDES,)),
}
# rule -> (a token, what is hidden)
_VALUES: dict[Rule, tuple[float, float]] = {
    "true": (True, False), "false": (False, True), "one": (1, 0), "zero": (0, 1), "additive": (0.0, -torch.inf),
}  # fmt: skip


def find_padding(flow: DataFlow, values: dict[fx.Node, Any]) -> tuple[Padding, ...]:
    """The masks of a graph, in its order; `values` are recorded at a batch of 2 and a few steps."""
    order = flow.order
    valued = _valued(order)
    found: dict[fx.Node, Padding] = {}
    tried: set[Any] = set()
    for node in order:
        for side in node.all_input_nodes:
            if side not in flow.side or side not in valued:
                continue
            added: fx.Node | None = None
            for mask in _candidates(side, valued, values):
                stream = _stream(node, flow, values, values[mask].shape)  # none behind what is a side itself
                if mask in found:
                    added = None
                    break
                # with other states once more: a mask may turn queries first, where it places tokens too
                if (mask, *stream) in tried or not stream:
                    continue
                tried.add((mask, *stream))
                rule = _rule(mask, node, stream, flow, values)
                if rule == "additive":
                    added = added or mask
                elif rule is not None and (added is None or not _reaches(rule, mask, added, flow, values)):
                    found[mask] = Padding(node=mask.name, rule=rule)
                    added = None
                    break
            if added is not None:
                found[added] = Padding(node=added.name, rule="additive")
    return tuple(found[n] for n in order if n in found)


def padding_of(region: Region, masks: Sequence[Padding]) -> tuple[Padding, ...]:
    """Those of `masks` that a region reads, and none of its own nodes is."""
    read = {n.name for n in values_read(region, {m.node for m in masks})}
    return tuple(m for m in masks if m.node in read)


def values_read(region: Region, stops: Container[str] = ()) -> list[fx.Node]:
    """The nodes past its entry whose values flow into a region, none from behind those called as in `stops`."""
    inside = {*region.nodes, region.entry}
    front = [i for n in region.nodes for i in n.all_input_nodes]
    found: dict[fx.Node, None] = {}
    while front:
        node = front.pop()
        if node in found or node in inside:
            continue
        found[node] = None
        if node.name not in stops and not is_size_only(node):
            front.extend(valued_inputs(node))
    return list(found)


def _valued(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that hold what inputs' values decide, not sizes and constants alone."""
    valued: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or (
            node.op == "call_function" and not is_size_only(node) and any(i in valued for i in node.all_input_nodes)
        ):
            valued.add(node)
    return valued


def _stream(node: fx.Node, flow: DataFlow, values: dict[fx.Node, Any], shape: torch.Size) -> list[fx.Node]:
    """The nearest hidden states (B, T, D) that a main node is computed from, itself left out."""
    found: list[fx.Node] = []
    front = [node]
    seen = {node}
    while front:
        for source in front.pop(0).all_input_nodes:
            if source in seen or source in flow.side or source not in flow.dag:
                continue
            seen.add(source)
            if _is_state(values[source], shape):
                found.append(source)
            else:
                front.append(source)
    return sorted(found, key=flow.order.__getitem__)


def _candidates(side: fx.Node, valued: set[fx.Node], values: dict[fx.Node, Any]) -> Iterable[fx.Node]:
    """The nearest (B, T) values behind what stands beside a stream."""
    front, seen = [side], {side}
    while front:
        node = front.pop(0)
        value = values[node]
        if isinstance(value, torch.Tensor) and value.ndim == 2:
            yield node
        for source in node.all_input_nodes:
            if source in valued and source not in seen:
                seen.add(source)
                front.append(source)


def _rule(
    mask: fx.Node, node: fx.Node, stream: list[fx.Node], flow: DataFlow, values: dict[fx.Node, Any]
) -> Rule | None:
    """What of a value's readings hides a step, at the next hidden state (B, T, D) after `node`; None for no mask."""
    end = _next_state(node, flow, values, values[stream[0]].shape[:2])
    if end is None:
        return None
    run = _between([mask, *stream], end, flow.order)
    dtype = values[mask].dtype
    rules: tuple[Rule, ...] = ("one", "zero")
    if dtype == torch.bool:
        rules = ("true", "false")
    elif dtype.is_floating_point:
        rules = ("one", "zero", "additive")
    return next((r for r in rules if _hides(r, mask, stream, end, run, values)), None)


@torch.no_grad()
def _reaches(rule: Rule, mask: fx.Node, added: fx.Node, flow: DataFlow, values: dict[fx.Node, Any]) -> bool:
    """Whether what is made of a mask to be added is low where the mask hides, as the logarithm of 1e-9 is not."""
    covered_BT = torch.full_like(values[mask], _VALUES[rule][1])
    made = evaluate_all(_between([mask], added, flow.order), values, {mask: covered_BT}, last=added)[added]
    return bool((made <= HIDES).all())


def _next_state(node: fx.Node, flow: DataFlow, values: dict[fx.Node, Any], shape: torch.Size) -> fx.Node | None:
    after = {node}
    for below in flow.order:
        if below is not node and not any(i in after for i in below.all_input_nodes):
            continue
        after.add(below)
        value = values.get(below)
        if _is_state(value, shape):
            return below
    return None


def _is_state(value: Any, shape: torch.Size) -> bool:
    """(B, T, D); scores are (B, T, T), and the recorded length is no width."""
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 3
        and value.is_floating_point()
        and value.shape[:2] == shape
        and value.shape[2] != shape[1]
    )


def _between(starts: list[fx.Node], end: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """All nodes that `starts` reach on their way to `end`, in order."""
    before = above([end], starts) | {*starts}
    after = set(starts)
    for node in sorted(before, key=order.__getitem__):
        if any(i in after for i in node.all_input_nodes):
            after.add(node)
    return [n for n in sorted(after & before, key=order.__getitem__) if n not in starts]


@torch.no_grad()
def _hides(
    rule: Rule,
    mask: fx.Node,
    stream: list[fx.Node],
    end: fx.Node,
    run: list[fx.Node],
    values: dict[fx.Node, Any],
) -> bool:
    """Step s of the first row, moved, moves others where the mask shows it, and no other where it hides it: then the
    step before is still seen. Where the reading is the wrong way round s alone is seen, and hardly moves what it is.
    """
    shown, hidden = _VALUES[rule]
    step = values[mask].shape[1] // 2
    seen_BT = torch.full_like(values[mask], shown)
    covered_BT = seen_BT.clone()
    covered_BT[0, step] = hidden

    def changes(at: int, given_BT: torch.Tensor) -> torch.Tensor:
        """How much each step of `end` changes with that step of the stream."""
        moved = _moved(stream, values, at)
        pair = [
            evaluate_all(run, values, {mask: given_BT, **states}, last=end)[end]
            for states in ({n: values[n] for n in stream}, moved)
        ]
        return (pair[0] - pair[1]).abs().amax(2)

    open_BT, closed_BT = changes(step, seen_BT), changes(step, covered_BT)
    if not (open_BT.isfinite().all() and closed_BT.isfinite().all()):
        return False
    bound = _MOVED * open_BT.max()
    others_T = torch.arange(open_BT.shape[1]) != step
    mixes = bool((open_BT[0, others_T] > bound).any())
    spills = bool((closed_BT[0, others_T] > bound).any())
    if mixes and not spills:
        before_T = torch.arange(open_BT.shape[1]) != step - 1
        both = [changes(step - 1, given_BT)[0, before_T] for given_BT in (seen_BT, covered_BT)]
        return bool((both[1] > bound).any()) or not bool((both[0] > bound).any())
    if mixes:
        return False
    # token-wise: a step that is hidden is multiplied by zero, or overwritten; so is the first by the sine of its place
    if rule != "additive" and bool(((values[mask] != shown) & (values[mask] != hidden)).any()):
        return False
    return bool(open_BT[0, step] > bound) and not spills and not bool(closed_BT[0, step] > bound)


def _moved(stream: list[fx.Node], values: dict[fx.Node, Any], step: int) -> dict[fx.Node, torch.Tensor]:
    """The hidden states with one step of the first row elsewhere."""
    generator = torch.Generator().manual_seed(3)
    moved = {}
    for node in stream:
        moved[node] = values[node].clone()
        noise = torch.randn(values[node].shape[-1], generator=generator).to(values[node])
        moved[node][0, step] += noise * values[node].std().clamp_min(1e-3)
    return moved
