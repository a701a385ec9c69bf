"""A plan as a table for people."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from thesean.passes.plan import Plan, PlannedPart


def render(plan: Plan, width: int = 140) -> str:
    """Plain text, one row a part, and a line of totals."""
    where = ", ".join(f"{k} {v}" for k, v in plan.sizes.items())
    table = Table(title=f"{len(plan.replaced)} of {len(plan)} parts replaced; FLOPs at {where}", title_justify="left")
    for name in ("part", "mixing", "shape", "params", "FLOPs"):
        table.add_column(name, justify="right" if name in ("params", "FLOPs") else "left", overflow="fold")
    table.add_column("target", overflow="fold")
    for name in ("params'", "FLOPs'"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for part in plan:
        new = ("", "") if part.kept else (count(part.new_params), count(part.new_flops))
        table.add_row(
            part.path,
            part.mixing,
            _shape(part),
            count(part.params),
            count(part.flops),
            _target(part),
            *new,
            _note(part),
        )
    table.add_section()
    totals = (count(plan.params), count(plan.flops), "", count(plan.new_params), count(plan.new_flops), "")
    table.add_row("whole model", "", "", *totals)
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(table)
    return out.getvalue().rstrip("\n")


def count(n: int) -> str:
    """1234567 -> "1.23 M"."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


def _shape(part: PlannedPart) -> str:
    first, second = (" x ".join(map(str, s)) for s in (part.input_shape, part.output_shape))
    return first if first == second else f"{first} -> {second}"


def _target(part: PlannedPart) -> str:
    options = ", ".join(f"{k}={v}" for k, v in part.options.items())
    return part.target + (f"({options})" if options else "")


def _note(part: PlannedPart) -> str:
    notes = []
    if part.replaces and part.replaces != (part.path,):
        notes.append("replaces " + ", ".join(r.removeprefix(part.path + ".") for r in part.replaces))
    if part.drops:
        notes.append("drops " + ", ".join(part.drops))
    return "; ".join(notes)
