"""The attention in a part that does more to what its heads give than to map it: a gate that multiplies it, a norm.

What a target takes over of an attention ends where its heads' outputs stand side by side. Cut out as far as there, the
rest stays the guide's own; a projection that the gate reads as well is computed on.

B batch, T time, H heads, K width of a value
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import between
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.regions import Region, is_single_entry_single_exit
from thesean.passes.analyse.scores import find_core, view_below
from thesean.targets.shared.facts import AttentionFacts

aten = torch.ops.aten

Read = Callable[[Region], AttentionFacts | None]


def heads_alone(region: Region, flow: DataFlow, values: dict[fx.Node, Any], read: Read) -> Region | None:
    """The stretch of an attention that can't be read as a whole, from a latent and what else it reads on, up to its
    heads' outputs (B, T, H K), or both, where that can be; else None. `read` is `find_attention` of a region.
    """
    if values[region.entry].ndim != 3 or read(region) is not None:
        return None
    later = _from_latents(region)
    found = (_up_to_heads(region, values),) if later is None else (later, _up_to_heads(later, values))
    readable = (r for r in found if r is not None and is_single_entry_single_exit(flow, r) and read(r) is not None)
    return next(readable, None)


def _up_to_heads(region: Region, values: dict[fx.Node, Any]) -> Region | None:
    core = find_core(region, values)
    end = None if core is None else _side_by_side(core.mixed, region, values)
    if core is None or end is None or end is region.exit:
        return None
    inner = Region(
        entry=region.entry, exit=end, nodes=tuple(between(region, [region.entry], end)), name=region.name, shares=True
    )
    scores = () if core.fused is not None else (core.added,)
    # who reads the weights themselves has them computed anyway
    return inner if {core.mixed, *scores} <= set(inner.gone) else None


def _from_latents(region: Region) -> Region | None:
    """What comes after the one place where all that an attention reads is joined: see LatentsSideBySide."""
    for entry in region.nodes:
        if entry.target is aten.cat.default and entry.users and all(map(_is_slice, entry.users)):
            nodes = between(region, [entry], region.exit)
            if region.exit in nodes:
                return Region(entry=entry, exit=region.exit, nodes=tuple(nodes), name=region.name)
    return None


def _is_slice(node: fx.Node) -> bool:
    return node.target is aten.slice.Tensor


def _side_by_side(mixed: fx.Node, region: Region, values: dict[fx.Node, Any]) -> fx.Node | None:
    """The view of (B, .., K) with the heads of a step in one dimension."""
    steps, width = values[region.entry].shape[:2], values[mixed].shape[-1]
    end = view_below(mixed, region, lambda node: values[node].ndim == 3 and values[node].shape[:2] == steps)
    return end if end is not None and values[end].shape[-1] % width == 0 else None
