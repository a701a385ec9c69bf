"""Does a region mix tokens, and does it look ahead? Perturb token t and see which outputs move.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thesean.errors import PlanError
from thesean.passes.analyse.fingerprint import exact_fingerprint
from thesean.passes.analyse.layout import is_channels_first
from thesean.passes.analyse.regions import Region
from thesean.passes.graph.nodes import owner
from thesean.passes.graph.record import Recorded, evaluate
from thesean.targets.shared.facts import Mixing

# Of the output's largest change: rounding moves other tokens by 1e-7, mixing by 1e-3 and more.
_MOVED = 1e-5


class MixedExamplesError(PlanError):
    """A part in which examples of a batch meet, or whose batch isn't its first dimension."""


def probe_mixing(region: Region, values: dict[fx.Node, Any]) -> Mixing:
    """ "none" (token-wise), "causal", or "bidirectional"; `values` are recorded on two examples of at least 3 tokens,
    or on one where the guide takes no more.

    Feature maps and vectors, which have no token dimension to probe, count as "bidirectional" and "none". Raises
    PlanError where one example changes another's output. Regions that differ in nothing but their parameters' values
    are probed once.
    """
    findings = values.findings if isinstance(values, Recorded) else {}
    key = ("mixing", region.entry, region.exit)
    if key not in findings:
        alike = ("mixing", exact_fingerprint(region))
        if alike not in findings:
            findings[alike] = _probe(region, values)
        findings[key] = findings[alike]
    return findings[key]


def _probe(region: Region, values: dict[fx.Node, Any]) -> Mixing:
    x, y = values[region.entry], values[region.exit]
    if x.ndim != 3 and x.shape[0] == y.shape[0] == 2 and _moves_the_other(region, values):
        raise _mixes_examples(region)
    if x.ndim == 2 or y.ndim == 2:
        return "none"
    if x.ndim != 3 or y.ndim != 3 or x.shape[1] != y.shape[1] or is_channels_first(region, values):
        return "bidirectional"
    last = x.shape[1] - 1
    generator = torch.Generator().manual_seed(0)
    mixes = looks_ahead = False
    # (example, token) moved in one run; in the last one the other example should stand still
    alone, both = (((0, 0),), ((0, last // 2),)), (((0, 0), (1, last // 2)),)
    for moves in (*(both if len(x) > 1 else alone), ((0, last),)):
        moved_x = x.clone()
        for example, t in moves:
            noise = torch.randn(x.shape[-1], generator=generator).to(x)
            moved_x[example, t] += noise * x.std().clamp_min(1e-3)
        change_BT = (evaluate(region.nodes, values, {region.entry: moved_x}, region.exit) - y).abs().amax(2)
        moved_BT = change_BT > _MOVED * change_BT.max()
        if len(moves) == 1 and bool(moved_BT[1:].any()):
            raise _mixes_examples(region)
        for example, t in moves:
            mixes |= bool(moved_BT[example, :t].any() or moved_BT[example, t + 1 :].any())
            looks_ahead |= bool(moved_BT[example, :t].any())
    if not mixes:
        return "none"
    return "bidirectional" if looks_ahead else "causal"


def _moves_the_other(region: Region, values: dict[fx.Node, Any]) -> bool:
    """Whether the first of two examples changes the second one's output."""
    x, y = values[region.entry], values[region.exit]
    moved = x.clone()
    noise = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(0)).to(x)
    moved[0] += noise * x.std().clamp_min(1e-3)
    change = (evaluate(region.nodes, values, {region.entry: moved}, region.exit) - y).abs()
    return bool(change[1].max() > _MOVED * change.max())


def _mixes_examples(region: Region) -> MixedExamplesError:
    place = region.path() or f"what ends in {owner(region.exit) or region.exit.name}"
    return MixedExamplesError(
        f"{place}: one example of a batch changes the output of another; expected the batch in the first dimension, "
        "found (batch, time, width) in another order or a part that mixes examples (statistics over the batch). Set "
        "batch_first=True in the guide, or keep the part with keep=[...]."
    )
