"""What a captured guide is probed with, and whether its outputs can be had token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean.errors import DataError
from thesean.passes.analyse.padding import Padding
from thesean.passes.analyse.positions import table_rows
from thesean.passes.analyse.receptive_field import receptive_field
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.nodes import owner
from thesean.passes.graph.record import Recorded, record

PROBE, _LONGEST_PROBE = 11, 1025  # tokens
_FEWEST = 5  # that are left of them after strides: on one or two, mixing does not show

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
        if value.is_floating_point() and not spec.mask:
            last += 1
        elif spec.high is not None:  # what is no index is a mask, and stays
            last.copy_((last + 1) % spec.high)
        moved[spec.name] = value
    pairs = [
        (a, b)
        for a, b in zip(*(_outputs(captured, x) for x in (inputs, moved)), strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    if not pairs or any(a.ndim < 2 or a.shape[1] != sizes[times[0]] for a, _ in pairs):
        return False
    changes = [(a - b).abs().transpose(0, 1).flatten(1).amax(1) for a, b in pairs]
    return all(bool(c[:-1].max() <= _MOVED * c[-1]) and bool(c[-1] > 0) for c in changes)


def _outputs(captured: Captured, inputs: dict[str, torch.Tensor]) -> list[Any]:
    """In float32 at least: rounding in half precision moves a token by more than many a look ahead."""
    graph_module = captured.graph_module
    return pytree.tree_leaves(record(graph_module, inputs, wide=True)[graph_module.graph.output_node()])


def recorded_probe(
    captured: Captured, masks_of: Callable[[Recorded], tuple[Padding, ...]]
) -> tuple[Recorded, tuple[Padding, ...]]:
    """Every node's value, in float32 at least, on small inputs that are made of the example, with nothing hidden by the
    masks that are found in them: what padding hides can't be probed. Raises DataError, naming the inputs and the
    operator that is the first to fail, where the guide gives no numbers on them: what is probed on NaN is not known.
    """
    device = str(next(iter(captured.example.values())).device)
    inputs = captured.signature.random_inputs(probe_sizes(captured), device=device)
    values = record(captured.graph_module, inputs, wide=True)
    masks = masks_of(values)
    if masks:
        named = {m.node: m for m in masks}
        shown = {n: named[n.name].all_seen(v) for n, v in values.items() if n.name in named}
        values = record(captured.graph_module, inputs, shown, wide=True)
    leaves = [v for v in pytree.tree_leaves(values[captured.graph_module.graph.output_node()]) if _is_float(v)]
    if any(bool(v.isnan().any()) or not bool(v.isfinite().any()) for v in leaves if v.numel()):
        first = next((n for n, v in values.items() if _is_float(v) and bool(v.isnan().any())), None)
        where = f" from {owner(first) or first.name} ({first.target}) on" if first is not None else ""
        given = ", ".join(_described(name, value) for name, value in inputs.items())
        raise DataError(
            f"the guide's outputs are not finite{where} when it is probed with inputs made of the example's ({given}). "
            "Give data= or example_inputs= of values that it takes, several rows of them."
        )
    return values, masks


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _described(name: str, value: torch.Tensor) -> str:
    if not value.numel() or value.is_complex():
        return f"{name} {tuple(value.shape)}"
    low, high = (v.item() for v in value.aminmax()) if value.dtype != torch.bool else (False, True)
    return f"{name} {tuple(value.shape)} from {low:.3g} to {high:.3g}"


def probe_sizes(captured: Captured) -> dict[str, int]:
    """Small sizes for probing: a length that no static dimension has, so that dimensions can be told apart, and longer
    than the kernels reach, as far as the guide's position table and the signature's bounds allow.
    """
    static: set[int] = set()
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            static.update(int(d) for d in value.shape if not isinstance(d, torch.SymInt))
    bounds = [b for b in captured.signature.bounds if not b.name.startswith("batch")]
    most = min(
        [table_rows(captured.graph_module) or _LONGEST_PROBE, _LONGEST_PROBE, *(b.most for b in bounds if b.most)]
    )
    least = min(max(PROBE, receptive_field(captured.graph_module.graph) + 2), most)
    least = _long_enough(captured.graph_module, least, most)
    # odd ones first: a length that is twice a width is told apart less well
    lengths = [*range(least | 1, most + 1, 2), *range(least, 1, -1)]
    length = next((n for n in lengths if n not in static), least)
    return captured.signature.within(
        {name: 2 if name.startswith("batch") else length for name in captured.signature.symbols}
    )


def _long_enough(graph_module: fx.GraphModule, least: int, most: int) -> int:
    """The length from `least` on, doubled, at which sequences behind strides still have some tokens; `least` where none
    is up to `most`.
    """
    names: dict[str, str] = graph_module.meta.get("symbols", {})
    lengths: set[Any] = set()
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point():
            shape: tuple[Any, ...] = tuple(value.shape)
            lengths.update(d.node.expr for d in shape[1:] if isinstance(d, torch.SymInt))
    # what the data decide has no number yet, and a batch is not to grow
    lengths = {
        e
        for e in lengths
        if all(str(s) in names for s in e.free_symbols)
        and any(not names[str(s)].startswith("batch") for s in e.free_symbols)
    }
    length = least
    while length <= most:
        sizes = {s: 2 if names[str(s)].startswith("batch") else length for e in lengths for s in e.free_symbols}
        if all(int(e.subs(sizes)) >= _FEWEST for e in lengths):
            return length
        length *= 2
    return least
