"""Find an attention in a region and read its projections off, numerically.

Where softmax(q k' scale) v stands is found in the graph. What q, k and v are is not matched against known patterns
(packed or separate, transposed, split, grouped, repeated): each is probed as an affine map of the region's input, one
basis vector a token, and checked on random input. What is not affine (a rotary embedding in between) is followed
upstream to the nearest value that is, and what lies between is read as a rotation where it is one.

B batch, T time, D width, H heads, K head width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import between, is_affine, match_weight, probe_rows
from thesean.passes.analyse.regions import Region
from thesean.passes.analyse.rotation import as_written, find_norm, find_rotation
from thesean.passes.graph.nodes import argument
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


_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCT = (aten.matmul.default, aten.bmm.default)

# An affine map recovered from basis vectors reproduces fp32 outputs to rounding; a rotary embedding is off by 1.
_EXACT = 1e-3


def find_attention(region: Region, values: dict[fx.Node, Any]) -> AttentionFacts | None:
    """The region's attention, or None where there is none whose output projection and values are affine."""
    if values[region.entry].ndim != 3:
        return None
    found = _core(region)
    if found is None:
        return None
    query, key, value, mixed, scale = found
    q, _k, v = values[query], values[key], values[value]
    if q.ndim != 4 or v.ndim != 4:
        return None
    heads = q.shape[1]
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    maps, turns = [], []
    for node, width in ((query, q.shape[-1]), (key, q.shape[-1]), (value, v.shape[-1])):
        nearest = _nearest_affine(region, values, node, width)
        if nearest is None:
            return None
        affine, turned = nearest
        maps.append(_repeat_heads(affine, heads, width))
        turns.append(turned)
    output = _output_map(region, values, mixed)
    if output is None:
        return None
    rotation, gain = _rotation(turns[0], turns[1], region)
    facts = AttentionFacts(
        heads=heads,
        scale=float(scale) * gain,
        query=maps[0],
        key=maps[1],
        value=maps[2],
        output=output,
        rotation=rotation,
        norms=_norms(turns[0], turns[1]),
    )
    plain = is_plain_attention(region, values, facts)
    dtype = region.entry.meta["val"].dtype  # the probe may have widened it: a weight of the guide's is shared again
    stored = {name: getattr(facts, name).to(dtype) for name in ("query", "key", "value", "output")}
    return replace(facts, **stored, plain=plain)


def _rotation(query: Turn | None, key: Turn | None, region: Region) -> tuple[Rotation | None, float]:
    """That of queries and keys, which must be one, and the scale that comes with it; none where it isn't known."""
    if query is None or key is None:
        return None, 1.0
    gain = query.scale * key.scale
    if query.rotation is None or key.rotation is None or query.rotation[:2] != key.rotation[:2]:
        return None, gain if query.rotation is None and key.rotation is None else 1.0
    constants = (n.meta.get("val") for n in region.exit.graph.find_nodes(op="get_attr"))
    return as_written(query.rotation, [c for c in constants if isinstance(c, torch.Tensor)]), gain


def _core(region: Region) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, float | None] | None:
    """(q, k, v, mixed values, scale) of the only attention in the region."""
    fused = [n for n in region.nodes if n.target is aten.scaled_dot_product_attention.default]
    if len(fused) == 1:
        node = fused[0]
        q, k, v = (argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
        return q, k, v, node, argument(node, 6, "scale")
    soft = [n for n in region.nodes if n.target in _SOFTMAX]
    if len(soft) != 1:
        return None
    return _written_out(region, soft[0])


def _written_out(region: Region, softmax: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, float] | None:
    """softmax(q @ k.T * scale + mask) @ v, spelled as separate operators."""
    inside = set(region.nodes)
    scale = 1.0
    node: Any = softmax.args[0]
    while isinstance(node, fx.Node) and node in inside and node.target not in _PRODUCT:
        factor = argument(node, 1, "other")
        if isinstance(factor, (int, float)):
            if node.target in (aten.mul.Tensor, aten.mul.Scalar):
                scale *= float(factor)
            elif node.target in (aten.div.Tensor, aten.div.Scalar):
                scale /= float(factor)
        main = [a for a in node.all_input_nodes if a in inside]
        if len(main) != 1:
            return None
        node = main[0]
    if not isinstance(node, fx.Node) or node not in inside:
        return None
    query, key = (argument(node, at, name) for at, name in enumerate(("self", "other")))
    after = softmax
    while after.target not in _PRODUCT:
        users = [u for u in after.users if u in inside]
        if len(users) != 1:
            return None
        after = users[0]
    return query, key, argument(after, 1, "other"), after, scale


def _tokens_first(value: torch.Tensor, batch: int, length: int) -> torch.Tensor | None:
    """(B, ..T..) -> (B, T, rest) with `rest` in the order of the remaining dimensions; None where T is ambiguous."""
    at = [d for d in range(1, value.ndim) if value.shape[d] == length]
    if value.ndim < 3 or value.shape[0] != batch or len(at) != 1:
        return None
    return value.movedim(at[0], 1).reshape(batch, length, -1)


def _probe(
    region: Region, values: dict[fx.Node, Any], source: fx.Node, wanted: fx.Node, given: torch.Tensor
) -> torch.Tensor | None:
    result = evaluate(between(region, [source], wanted), values, {source: given}, wanted)
    shape = values[source].shape
    return _tokens_first(result, shape[0], _length(values[source]))


def _length(value: torch.Tensor) -> int:
    """The probed sequence length; recordings use one that equals no head count or width."""
    return int(value.shape[-2])


@torch.no_grad()
def _affine(region: Region, values: dict[fx.Node, Any], source: fx.Node, wanted: fx.Node) -> Affine | None:
    """`wanted` as a token-wise affine function of `source`, or None. Exact up to rounding, checked on fresh input."""
    template = values[source]
    flat = _tokens_first(template, template.shape[0], _length(template))
    if flat is None:
        return None
    batch, length, width = flat.shape
    unflatten = _unflattener(template, length)
    rows_MI = probe_rows(template, width)
    if len(rows_MI) <= batch * length:
        # cheaper than a basis by far: refuses what isn't affine, and finds maps that are a weight of the guide's
        filled = torch.nn.functional.pad(rows_MI, (0, 0, 0, batch * length - len(rows_MI)))
        out = _probe(region, values, source, wanted, unflatten(filled.view(batch, length, width)))
        if out is None or not is_affine(out.flatten(0, 1)[: len(rows_MI)]):
            return None
        shared = match_weight(between(region, [source], wanted), values, rows_MI, out.flatten(0, 1)[: len(rows_MI)])
        if shared is not None:
            return shared
    zero = _probe(region, values, source, wanted, torch.zeros_like(template))
    if zero is None:
        return None
    bias_O = zero[0, 0]
    columns = []
    per_run = batch * length
    for start in range(0, width, per_run):
        basis = torch.zeros(per_run, width, dtype=template.dtype, device=template.device)
        count = min(per_run, width - start)
        basis[torch.arange(count), start + torch.arange(count)] = 1
        out = _probe(region, values, source, wanted, unflatten(basis.view(batch, length, width)))
        if out is None:
            return None
        columns.append((out.reshape(per_run, -1) - bias_O)[:count])
    weight_OI = torch.cat(columns).T.contiguous()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(flat.shape, generator=generator).to(template)
    got = _probe(region, values, source, wanted, unflatten(x))
    want = x @ weight_OI.T + bias_O
    if got is None or (got - want).abs().max() > _EXACT * want.abs().max():
        return None
    return Affine(weight_OI, bias_O.clone())


def _unflattener(template: torch.Tensor, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of `_tokens_first` for this shape."""
    at = next(d for d in range(1, template.ndim) if template.shape[d] == length)
    rest = [s for d, s in enumerate(template.shape) if d not in (0, at)]
    return lambda flat: flat.view(template.shape[0], length, *rest).movedim(1, at).contiguous()


def _nearest_affine(
    region: Region, values: dict[fx.Node, Any], node: fx.Node, head_width: int
) -> tuple[Affine, Turn | None] | None:
    """The affine map at `node`, or at its nearest ancestor of the same head width that what follows turns, or else at
    the nearest of all, breadth first; and what follows, where it is known.
    """
    inside = set(region.nodes)
    front, seen = [node], {node}
    nearest: Affine | None = None
    while front:
        current = front.pop(0)
        value = values[current]
        shaped = isinstance(value, torch.Tensor) and value.ndim == 4 and head_width in value.shape[1:]
        if shaped and current in inside:
            affine = _affine(region, values, region.entry, current)
            if affine is not None and current is node:
                return affine, Turn()
            if affine is not None:
                turn = _turn(region, values, current, node)
                if turn is not None:
                    return affine, turn
                nearest = nearest or affine
        for parent in current.all_input_nodes:
            if parent in inside and parent not in seen:
                seen.add(parent)
                front.append(parent)
    return None if nearest is None else (nearest, None)


def _turn(region: Region, values: dict[fx.Node, Any], source: fx.Node, wanted: fx.Node) -> Turn | None:
    """What makes `wanted` of `source`: turned or not, after a norm of each head or without; None for anything else."""
    run = between(region, [source], wanted)
    found = find_rotation(values, run, source, wanted)
    if found is not None:
        return Turn(*found)
    normed = find_norm(values, run, source)
    if normed is None:
        return None
    norm, node = normed
    if node is wanted:
        return Turn(norm=norm)
    found = find_rotation(values, between(region, [node], wanted), node, wanted)
    return None if found is None else Turn(*found, norm)


def _norms(query: Turn | None, key: Turn | None) -> tuple[HeadNorm, HeadNorm] | None:
    if query is None or key is None or query.norm is None or key.norm is None:
        return None
    return query.norm, key.norm


def _repeat_heads(affine: Affine, heads: int, head_width: int) -> Affine:
    """Grouped keys and values, one copy for every query head."""
    have = affine.weight_OI.shape[0] // head_width
    if have == heads or have == 0 or heads % have:
        return affine
    weight = affine.weight_OI.view(have, head_width, -1).repeat_interleave(heads // have, 0).flatten(0, 1)
    return Affine(weight, affine.bias_O.view(have, head_width).repeat_interleave(heads // have, 0).flatten())


def _output_map(region: Region, values: dict[fx.Node, Any], mixed: fx.Node) -> Affine | None:
    """The region's output as an affine map of the concatenated heads."""
    return _affine(region, values, mixed, region.exit)


# Of the output's largest value: two orders of summation differ by 1e-6, a rotary embedding by 1e-1.
_EXACT = 1e-4


@torch.no_grad()
def is_plain_attention(region: Region, values: dict[fx.Node, Any], facts: AttentionFacts) -> bool:
    """The region computes output(softmax(q k' scale + causal mask or none) v) on random input, within rounding, with q
    and k turned where it is known how.

    A relative bias, a soft cap or a normalised key is seen; a window or a distance that only tells past the recorded
    length is not, nor are masks of the guide's inputs, which recordings leave open.
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
