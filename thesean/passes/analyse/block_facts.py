"""Find a block of one attention and one MLP, each added to the stream, and read it off, numerically.

x -> x + attention(norm(x)) -> the same with an MLP, both beside each other, or the norms after the sums: what decides
is what each branch reads. A norm after the last sum is not the block's: whatever takes the block's place ends with that
sum, so that the norm stays the guide's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import between
from thesean.passes.analyse.attention import find_attention
from thesean.passes.analyse.blocks import outer_halves
from thesean.passes.analyse.chains import segments_of
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.head_norms import find_norm
from thesean.passes.analyse.mixing import probe_mixing
from thesean.passes.analyse.mlp import find_mlp
from thesean.passes.analyse.regions import Region, join, join_of
from thesean.targets.shared.facts import BlockFacts, NormFacts

# An eps that fp32 can't tell from none; without any a token of zeros would be no number.
_LEAST = 1e-12


class FoundBlock(NamedTuple):
    """`region` is what of a block is read off: from the stream before its first branch to the last sum."""

    region: Region
    facts: BlockFacts


def find_block(flow: DataFlow, region: Region, values: dict[fx.Node, Any]) -> FoundBlock | None:
    """The block that a region is, or None: more branches or other ones, or more between them than a norm."""
    if not isinstance(values[region.entry], torch.Tensor) or values[region.entry].ndim != 3:
        return None
    segments = segments_of(flow, region)
    forks = [s for s in segments if s.is_residual()]
    branches = outer_halves(flow, region)
    if len(branches) != 2 or not forks or any(s.is_heavy() for s in segments if s not in forks):
        return None
    if any(join_of(b) is None for b in branches):
        return None  # normed before it is added, which no facts tell
    mixing = [b for b in branches if probe_mixing(b, values) != "none"]
    if len(mixing) != 1:
        return None
    (mixer,) = mixing
    (perceptron,) = (b for b in branches if b is not mixer)
    in_a_row = len(forks) == 2
    if in_a_row and mixer is not branches[0]:
        return None  # an MLP before the attention reads another stream than a block beside it would
    block = join(forks[0], forks[-1], segments[segments.index(forks[0]) + 1 : segments.index(forks[-1])])
    streams = (forks[0].entry, forks[0].exit if in_a_row else forks[0].entry)
    read, norms = zip(
        *(_norm_before(block, stream, b.entry, values) for stream, b in zip(streams, (mixer, perceptron), strict=True)),
        strict=True,
    )
    attention, mlp = find_attention(mixer, values), find_mlp(perceptron, values)
    if attention is None or mlp is None or not all(read) or (norms[0] is not None and norms[1] is None):
        return None
    facts = BlockFacts(attention=attention, mlp=mlp, attention_norm=norms[0], mlp_norm=norms[1], in_a_row=in_a_row)
    return FoundBlock(block, facts)


def _norm_before(
    block: Region, stream: fx.Node, read: fx.Node, values: dict[fx.Node, Any]
) -> tuple[bool, NormFacts | None]:
    """Whether a branch reads the stream itself, or a norm of it, and which."""
    if read is stream:
        return True, None
    value = values[stream]
    width = value.shape[-1]
    found = find_norm(values, between(block, [stream], read), stream, width, value.shape[1])
    if found is None or found.node is not read:
        return False, None
    weight_D = found.norm.weight.reshape(width)
    bias_D = torch.zeros_like(weight_D) if found.norm.bias is None else found.norm.bias.reshape(width)
    dtype = stream.meta["val"].dtype
    return True, NormFacts(weight_D.to(dtype), bias_D.to(dtype), max(found.norm.eps, _LEAST), found.centred)
