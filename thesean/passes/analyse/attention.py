"""Find an attention in a region and read its projections off, numerically.

Where softmax(q k' scale + bias) v stands is found in the graph (`scores`). What q, k and v are is not matched against
known patterns (packed or separate, transposed, split, grouped, repeated): each is probed as an affine map of the
region's input, one basis vector a token, and checked on random input. What is not affine (a rotary embedding in
between) is followed upstream to the nearest value that is, and what lies between is read as a norm and a rotation where
it is that.

B batch, T time, D width, H heads, K head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import between, is_affine, match_weight, probe_rows
from thesean.passes.analyse.head_norms import find_norm
from thesean.passes.analyse.regions import Region
from thesean.passes.analyse.rotation import as_written, find_rotation, find_turned, turned_back
from thesean.passes.analyse.scores import Operand, find_core, read_scores
from thesean.passes.graph.record import evaluate
from thesean.targets.shared.facts import Affine, AttentionFacts
from thesean.targets.shared.head_norm import HeadNorm
from thesean.targets.shared.rotation import Rotation

aten = torch.ops.aten


class Turn(NamedTuple):
    """What lies between a projection and its use: a norm, a rotation, a scale."""

    rotation: Rotation | None = None
    scale: float = 1.0
    norm: HeadNorm | None = None


_UNREAD = "queries and keys that are changed before they meet"

# Of the output's largest value: two orders of summation differ by 1e-6, a rotary embedding by 1e-1.
_EXACT = 1e-4


def find_attention(region: Region, values: dict[fx.Node, Any]) -> AttentionFacts | None:
    """The region's attention, or None where there is none whose output projection and values are affine."""
    if values[region.entry].ndim != 3:
        return None
    core = find_core(region, values)
    if core is None:
        return None
    heads, width = (core.query.of(values[core.query.node]).shape[d] for d in (1, 3))
    value_width = core.value.of(values[core.value.node]).shape[3]
    scores = read_scores(region, values, core)
    operands = ((core.query, width), (core.key, width), (core.value, value_width))
    found: list[tuple[Affine, Turn | None]] = []
    for operand, each in operands:
        nearest = _nearest_affine(region, values, operand, each)
        if nearest is None:
            return None
        found.append(nearest)
    if _in_other_orders(found[0][1], found[1][1]):
        whole = [_turned_whole(region, values, operand) for operand in (core.query, core.key)]
        found = [anew or before for anew, before in zip([*whole, None], found, strict=True)]
    maps = [_repeat_heads(affine, heads, each) for (affine, _), (_, each) in zip(found, operands, strict=True)]
    output = _affine(region, values, core.mixed, region.exit)
    if output is None:
        return None
    known = _met(found[0][1], found[1][1], region, heads)
    rotation, gain, norms = known or (None, 1.0, None)
    facts = AttentionFacts(
        heads=heads,
        scale=scores.scale * gain,
        query=maps[0],
        key=maps[1],
        value=maps[2],
        output=output,
        rotation=rotation,
        norms=norms,
        bias=scores.bias,
    )
    differs = scores.differs or ("" if known is not None else _UNREAD)
    if not differs and not computes(region, values, facts):
        differs = "more than was read off"
    dtype = region.entry.meta["val"].dtype  # the probe may have widened it: a weight of the guide's is shared again
    stored = {name: getattr(facts, name).to(dtype) for name in ("query", "key", "value", "output")}
    return replace(facts, **stored, plain=not differs, differs=differs)


def _in_other_orders(query: Turn | None, key: Turn | None) -> bool:
    """Features that are turned by pairs stand in the order of where each was read, which may differ."""
    one, other = (None if turn is None else turn.rotation for turn in (query, key))
    return one is not None and other is not None and one[:2] != other[:2]


def _met(
    query: Turn | None, key: Turn | None, region: Region, heads: int
) -> tuple[Rotation | None, float, tuple[HeadNorm, HeadNorm] | None] | None:
    """The rotation of queries and keys, which must be one, the scale that comes with it, and both norms; None where it
    isn't known.
    """
    if query is None or key is None:
        return None
    gain, norms, rotation = query.scale * key.scale, None, None
    if query.norm is not None and key.norm is not None and query.norm.whole == key.norm.whole:
        norms = (_each_head(query.norm, heads), _each_head(key.norm, heads))
    elif query.norm is not None or key.norm is not None:
        return None
    if query.rotation is not None and key.rotation is not None and query.rotation[:2] == key.rotation[:2]:
        constants = (n.meta.get("val") for n in region.exit.graph.find_nodes(op="get_attr"))
        rotation = as_written(query.rotation, [c for c in constants if isinstance(c, torch.Tensor)])
    elif query.rotation is not None or key.rotation is not None:
        return None
    return rotation, gain, norms


def _each_head(norm: HeadNorm, heads: int) -> HeadNorm:
    """Grouped keys' weights, one copy for every query head."""
    return norm.each(lambda rows_GC: rows_GC.repeat_interleave(heads // len(rows_GC), 0))


def _tokens_first(value: torch.Tensor, batch: int, length: int) -> torch.Tensor | None:
    """(B, ..T..) -> (B, T, rest) with `rest` in the order of the remaining dimensions; None where T is ambiguous."""
    at = _time_of(value, length)
    if value.ndim < 3 or value.shape[0] != batch or at is None:
        return None
    return value.movedim(at, 1).reshape(batch, length, -1)


def _time_of(value: torch.Tensor, length: int) -> int | None:
    """The dimension that is as long, and not the last one where others are too: features come there."""
    at = [d for d in range(1, value.ndim) if value.shape[d] == length]
    at = at if len(at) < 2 else [d for d in at if d < value.ndim - 1]
    return at[0] if len(at) == 1 else None


Undo = Callable[[torch.Tensor], torch.Tensor]


def _probe(
    region: Region,
    values: dict[fx.Node, Any],
    source: fx.Node,
    wanted: fx.Node,
    given: torch.Tensor,
    undo: Undo | None = None,
) -> torch.Tensor | None:
    """(B, T, rest); `undo` makes that of the value as it is."""
    result = evaluate(between(region, [source], wanted), values, {source: given}, wanted)
    return _tokens_first(result, *_size(region, values)) if undo is None else undo(result)


def _size(region: Region, values: dict[fx.Node, Any]) -> tuple[int, int]:
    """Batch and length that were probed; recordings use a length that equals no head count or width."""
    batch, length = values[region.entry].shape[:2]
    return int(batch), int(length)


@torch.no_grad()
def _affine(
    region: Region, values: dict[fx.Node, Any], source: fx.Node, wanted: fx.Node, undo: Undo | None = None
) -> Affine | None:
    """`wanted` as a token-wise affine function of `source`, or None. Exact up to rounding, checked on fresh input."""
    template = values[source]
    flat = _tokens_first(template, *_size(region, values))
    if flat is None:
        return None
    batch, length, width = flat.shape
    unflatten = _unflattener(template, length)
    rows_MI = probe_rows(template, width)
    if len(rows_MI) <= batch * length:
        # cheaper than a basis by far: refuses what isn't affine, and finds maps that are a weight of the guide's
        filled = torch.nn.functional.pad(rows_MI, (0, 0, 0, batch * length - len(rows_MI)))
        out = _probe(region, values, source, wanted, unflatten(filled.view(batch, length, width)), undo)
        if out is None or not is_affine(out.flatten(0, 1)[: len(rows_MI)]):
            return None
        shared = match_weight(between(region, [source], wanted), values, rows_MI, out.flatten(0, 1)[: len(rows_MI)])
        if shared is not None:
            return shared
    zero = _probe(region, values, source, wanted, torch.zeros_like(template), undo)
    if zero is None:
        return None
    bias_O = zero[0, 0]
    columns = []
    per_run = batch * length
    for start in range(0, width, per_run):
        basis = torch.zeros(per_run, width, dtype=template.dtype, device=template.device)
        count = min(per_run, width - start)
        basis[torch.arange(count), start + torch.arange(count)] = 1
        out = _probe(region, values, source, wanted, unflatten(basis.view(batch, length, width)), undo)
        if out is None:
            return None
        columns.append((out.reshape(per_run, -1) - bias_O)[:count])
    weight_OI = torch.cat(columns).T.contiguous()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(flat.shape, generator=generator).to(template)
    got = _probe(region, values, source, wanted, unflatten(x), undo)
    want = x @ weight_OI.T + bias_O
    if got is None or (got - want).abs().max() > _EXACT * want.abs().max():
        return None
    return Affine(weight_OI, bias_O.clone())


def _unflattener(template: torch.Tensor, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of `_tokens_first` for this shape."""
    at = _time_of(template, length)
    assert at is not None
    rest = [s for d, s in enumerate(template.shape) if d not in (0, at)]
    return lambda flat: flat.view(template.shape[0], length, *rest).movedim(1, at).contiguous()


def _nearest_affine(
    region: Region, values: dict[fx.Node, Any], operand: Operand, head_width: int
) -> tuple[Affine, Turn | None] | None:
    """The affine map at the operand, or at its nearest ancestor with heads of the same width, apart or side by side,
    that what follows turns, or else at the nearest of all, breadth first; and what follows, where it is known.
    """
    inside = set(region.nodes)
    node = operand.node
    front, seen = [node], {node}
    nearest: Affine | None = None
    while front:
        current = front.pop(0)
        if current in inside and _holds_heads(values[current], values[node], head_width):
            affine = _affine(region, values, region.entry, current)
            if affine is not None and current is node:
                return affine, Turn()
            if affine is not None:
                turned = _turn(region, values, current, operand, affine)
                if turned is not None:
                    return turned
                nearest = nearest or (affine if values[current].ndim == 4 else None)
        for parent in current.all_input_nodes:
            if parent in inside and parent not in seen:
                seen.add(parent)
                front.append(parent)
    return _turned_whole(region, values, operand) or (None if nearest is None else (nearest, None))


def _turned_whole(region: Region, values: dict[fx.Node, Any], operand: Operand) -> tuple[Affine, Turn] | None:
    """Where no one value holds what is turned: the map to the operand itself, turned back."""
    if operand.of(values[operand.node]).shape[2] != _size(region, values)[1]:  # keys of other steps than its own
        return None
    rotation = find_turned(values, between(region, [region.entry], operand.node), region.entry, operand)
    if rotation is None:
        return None
    affine = _affine(
        region, values, region.entry, operand.node, lambda value: turned_back(rotation, operand.of(value)).flatten(2)
    )
    return None if affine is None else (affine, Turn(rotation if rotation.angle else None))


def _holds_heads(value: Any, wanted: torch.Tensor, width: int) -> bool:
    """(.., C, ..) of four dimensions, or (B, T, G C) with no more than what is wanted in it."""
    if not isinstance(value, torch.Tensor):
        return False
    if value.ndim == 4:
        return width in value.shape[1:]
    return value.ndim == 3 and value.shape[-1] % width == 0 and wanted.numel() % value.numel() == 0


def _turn(
    region: Region, values: dict[fx.Node, Any], source: fx.Node, wanted: Operand, affine: Affine
) -> tuple[Affine, Turn] | None:
    """What makes `wanted` of `source`: turned or not, after a norm or without; None for anything else. The map to the
    source comes along, less the mean of what a norm is about its mean.
    """
    run = between(region, [source], wanted.node)
    found = find_rotation(values, run, source, wanted)
    if found is not None:
        return affine, Turn(*found)
    width = wanted.of(values[wanted.node]).shape[3]
    normed = find_norm(values, run, source, width, _size(region, values)[1])
    if normed is None:
        return None
    centred = normed.centre(affine, width)
    if normed.node is wanted.node:
        return centred, Turn(norm=normed.norm)
    found = find_rotation(values, between(region, [normed.node], wanted.node), normed.node, wanted)
    return None if found is None else (centred, Turn(*found, normed.norm))


def _repeat_heads(affine: Affine, heads: int, head_width: int) -> Affine:
    """Grouped keys and values, one copy for every query head."""
    have = affine.weight_OI.shape[0] // head_width
    if have == heads or have == 0 or heads % have:
        return affine
    weight = affine.weight_OI.view(have, head_width, -1).repeat_interleave(heads // have, 0).flatten(0, 1)
    return Affine(weight, affine.bias_O.view(have, head_width).repeat_interleave(heads // have, 0).flatten())


@torch.no_grad()
def computes(region: Region, values: dict[fx.Node, Any], facts: AttentionFacts) -> bool:
    """The region computes output(softmax(q k' scale + bias + causal mask or none) v) on random input, within rounding,
    with q and k normed and turned where it is known how.

    A soft cap or a gate is seen; a window that is wider than the lengths that were looked at is not, nor are masks of
    the guide's inputs, which recordings leave open.
    """
    template = values[region.entry]
    generator = torch.Generator().manual_seed(2)
    x_BTD = torch.randn(template.shape, generator=generator).to(template) * template.std().clamp_min(1e-3)
    want_BTD = evaluate(region.nodes, values, {region.entry: x_BTD}, region.exit)
    for causal in (True, False):
        got_BTD = facts.output.of(facts.mixed_values(x_BTD, causal))
        if got_BTD.shape == want_BTD.shape and (got_BTD - want_BTD).abs().max() <= _EXACT * want_BTD.abs().max():
            return True
    return False
