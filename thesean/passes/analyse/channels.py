"""Read a convolutional region off its graph: which steps keep channels apart, which mix them, and with what weights.

Operators are read by what they are, constants by their values, and norms by running statistics become a scale and a
shift, folded into the convolution before them. Where some of a convolution's channels go one way and the others another
(a gated linear unit), it is two. What was read must reproduce the recorded output.

B batch, C channels, O output channels, I input channels
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.channel_operators import Unread
from thesean.passes.analyse.channel_reader import ChannelReader
from thesean.passes.analyse.regions import Region
from thesean.targets.shared.channel_groups import ChannelFacts

# Of the output's largest value.
_EXACT = 1e-4


@torch.no_grad()
def find_channels(region: Region, values: Mapping[fx.Node, Any]) -> tuple[ChannelFacts | None, str]:
    """The region's steps; or None, and what of it can't be read."""
    x = values[region.entry]
    if not isinstance(x, torch.Tensor) or x.ndim not in (2, 3, 4, 5) or not x.is_floating_point():
        return None, "it reads no feature map"
    first, *others = (False,) if x.ndim == 2 else (False, True)
    facts, unread, furthest = _read(region, values, channels_last=first)
    for channels_last in others if facts is None else ():
        facts, why, at = _read(region, values, channels_last=channels_last)
        if at > furthest:
            unread = why
    return facts, "" if facts is not None else unread


def _read(
    region: Region, values: Mapping[fx.Node, Any], *, channels_last: bool
) -> tuple[ChannelFacts | None, str, int]:
    """With the entry laid out in one way: the region's steps or None, what can't be read, and how many nodes could."""
    reader = ChannelReader(region.entry, values, channels_last)
    for number, node in enumerate(region.nodes):
        try:
            reader.read(node)
        except Unread as unread:
            return None, f"{str(node.target).removeprefix('aten.')} {unread}".strip(), number
    if region.exit not in reader.numbers:
        return None, "it gives what is no map", len(region.nodes)
    if (region.exit in reader.turned) != channels_last:
        return None, "it gives channels in another place than it reads them", len(region.nodes)
    facts, y = reader.facts(region.exit)
    wanted = values[region.exit]
    if y.shape != wanted.shape or (y - wanted).abs().max() > _EXACT * wanted.abs().max():
        return None, "what was read of it gives something else", len(region.nodes)
    return facts, "", len(region.nodes)
