"""What a captured guide is probed with, and whether its outputs can be had token by token."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from thesean.passes.analyse.positions import table_rows
from thesean.passes.analyse.receptive_field import receptive_field
from thesean.passes.capture.captured import Captured

_PROBE, _LONGEST_PROBE = 11, 1025  # tokens

# Of the change at the token itself: rounding moves earlier ones by 1e-7, a look ahead by 1e-3 and more
_MOVED = 1e-5


@torch.no_grad()
def decodes(captured: Captured) -> bool:
    """Whether no output of a token moves when the last one does, so that they can be had one by one."""
    signature = captured.signature
    times = [s for s in signature.symbols if not s.startswith("batch")]
    if len(times) != 1 or any(times[0] not in spec.shape for spec in signature.inputs):
        return False
    sizes = probe_sizes(captured)
    device = str(next(iter(captured.example.values())).device)
    inputs = signature.random_inputs(sizes, device=device)
    moved = dict(inputs)
    for spec in signature.inputs:
        value = inputs[spec.name].clone()
        last = value.select(spec.shape.index(times[0]), -1)
        if value.is_floating_point():
            last += 1
        elif spec.high is not None:  # what is no index is a mask, and stays
            last.copy_((last + 1) % spec.high)
        moved[spec.name] = value
    pairs = [
        (a, b)
        for a, b in zip(*(pytree.tree_leaves(captured.graph_module(**x)) for x in (inputs, moved)), strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    if not pairs or any(a.ndim < 2 or a.shape[1] != sizes[times[0]] for a, _ in pairs):
        return False
    changes = [(a - b).abs().transpose(0, 1).flatten(1).amax(1) for a, b in pairs]
    return all(bool(c[:-1].max() <= _MOVED * c[-1]) and bool(c[-1] > 0) for c in changes)


def probe_sizes(captured: Captured) -> dict[str, int]:
    """Small sizes for probing: a length that no static dimension has, so that dimensions can be told apart, and longer
    than the kernels reach, as far as the guide's position table allows.
    """
    static: set[int] = set()
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            static.update(int(d) for d in value.shape if not isinstance(d, torch.SymInt))
    most = min(table_rows(captured.graph_module) or _LONGEST_PROBE, _LONGEST_PROBE)
    least = min(max(_PROBE, receptive_field(captured.graph_module.graph) + 2), most)
    # odd ones first: a length that is twice a width is told apart less well
    lengths = [*range(least | 1, most + 1, 2), *range(least, 1, -1)]
    length = next((n for n in lengths if n not in static), least)
    return {name: 2 if name.startswith("batch") else length for name in captured.signature.symbols}
