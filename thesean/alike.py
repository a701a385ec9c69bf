"""How alike guide and converted are where replaced parts end.

N rows, P width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from thesean.distill.seen import Seen, rows
from thesean.errors import DataError, NumericalError
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.plan import Plan
from thesean.report.conversion import ConversionReport
from thesean.report.page.findings import Alike
from thesean.similarity import get_measure

_ROWS = 512  # enough for two digits, and a Gram that costs nothing
_PARTS = 24  # more are not read on a page

Inputs = Mapping[str, torch.Tensor]
Masks = Sequence[Sequence[torch.Tensor | None]]


class Conversion(Protocol):
    """What a page reads of a `Converted`."""

    @property
    def module(self) -> fx.GraphModule: ...
    @property
    def signature(self) -> Signature: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def report(self) -> ConversionReport: ...
    @property
    def frontier(self) -> Sequence[Conversion]: ...


def alike(guide: fx.GraphModule, converted: Conversion, batches: Sequence[Inputs]) -> tuple[Alike | None, str]:
    """CKA of every exit with every other, or None and why."""
    pairs = _exits(guide, converted)
    missing = len(converted.plan.replaced) - len(pairs)
    pairs = pairs[:_PARTS]
    if not pairs:
        return None, "No replaced part's exit could be found in both graphs."
    masks = _masks(guide, [there for _, there, _ in pairs], batches)
    x = _rows_at(guide, [there for _, there, _ in pairs], batches, masks)
    y = _rows_at(converted.module, [here for _, _, here in pairs], batches, masks)
    if any(len(value) != len(x[0]) for value in (*x, *y)):
        return None, "Parts end in other numbers of rows: there is no one similarity to tell."
    measure = get_measure("cka-debiased")
    if len(x[0]) < measure.min_examples:
        return None, f"Too few rows for CKA: {len(x[0])}."
    matrix = tuple(tuple(_cka(measure, x_NP, y_NP) for y_NP in y) for x_NP in x)
    note = f"{missing} parts are left out: what comes after them is a replacement too." if missing else ""
    return Alike(parts=tuple(path for path, _, _ in pairs), matrix=matrix, rows=len(x[0]), note=note), ""


def _cka(measure: Any, x_NP: torch.Tensor, y_NP: torch.Tensor) -> float:
    try:
        return float(measure.value(x_NP, y_NP))
    except (DataError, NumericalError):  # one that doesn't vary has none
        return float("nan")


def _exits(guide: fx.GraphModule, converted: Conversion) -> list[tuple[str, str, str]]:
    """(path, the guide's node, the converted network's node) of each replaced part.

    A hybrid is the guide's graph with modules in it: what reads a module reads in the guide what the part gave.
    """
    in_guide = {node.name: node for node in guide.graph.nodes}
    paths = [part.path for part in converted.plan.replaced]
    found = []
    for number, path in enumerate(paths):
        for graph in (converted.module.graph, *_earlier(converted, number)):
            if (pair := _exit(graph, f"part_{number}", in_guide)) is not None:
                found.append((path, *pair))
                break
    return found


def _earlier(converted: Conversion, number: int) -> list[fx.Graph]:
    """The hybrid in which nothing behind the part is replaced yet."""
    return [converted.frontier[number + 1].module.graph] if number + 1 < len(converted.frontier) - 1 else []


def _exit(graph: fx.Graph, name: str, in_guide: Mapping[str, fx.Node]) -> tuple[str, str] | None:
    for node in graph.nodes:
        if node.op != "call_module" or node.target != name:
            continue
        given = next((u for u in node.users if "getitem" in u.name), node)
        for user in given.users:
            other = in_guide.get(user.name)
            if other is None or len(other.all_input_nodes) != len(user.all_input_nodes):
                continue
            return other.all_input_nodes[user.all_input_nodes.index(given)].name, given.name
    return None


def _masks(guide: fx.GraphModule, names: Sequence[str], batches: Sequence[Inputs]) -> Masks:
    """Which steps of each of the guide's nodes are tokens, batch by batch."""
    seen = Seen(guide)
    if not seen.masks:
        return [[None] * len(names)] * len(batches)
    masks = intermediates(guide, seen.names, with_output=False)
    return [[seen.of(name, values) for name in names] for values in (masks(**inputs) for inputs in batches)]


def _rows_at(
    module: fx.GraphModule, names: Sequence[str], batches: Sequence[Inputs], masks: Masks
) -> list[torch.Tensor]:
    """(N, P) of each node: positions of sequences that hold a token are rows, whole examples of maps."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    here = {node.name for node in module.graph.nodes}
    exits = intermediates(module, [name for name in names if name in here], with_output=False)
    for inputs, shown in zip(batches, masks, strict=True):
        mask_of = dict(zip(names, shown, strict=True))
        for name, value in exits(**inputs).items():
            if not isinstance(value, torch.Tensor):
                continue
            kept = rows(value, mask_of[name])
            rows_NP = value.flatten(0, 1) if kept is value and value.ndim == 3 else kept.flatten(1)
            share = max(1, _ROWS // len(batches))
            step = -(-len(rows_NP) // share)
            found[name].append(rows_NP[::step].double().cpu())
    return [torch.cat(found[name]) if found[name] else torch.zeros(0, 1) for name in names]
