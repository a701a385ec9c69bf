"""A rotation of queries and keys in the text of a window's function."""

from __future__ import annotations

from thesean.deploy.lowering.text import Text
from thesean.deploy.lowering.window_function.shape import Shape


def partner(t: Text, name: str, x: str, s: Shape) -> str:
    """Each feature's partner in its place."""
    if not s.runs:
        return t(name, "Gather", x, "partner_C", axis=-1)
    ordered = sorted(s.runs)
    parts = {run: f"{name}_{run[0]}" for run in ordered}
    t.split(tuple(parts[run] for run in ordered), x, tuple(end - start for start, end in ordered), -1)
    return t(name, "Concat", *(parts[run] for run in s.runs), axis=-1)


def turn(t: Text, name: str, x: str, tables: tuple[str, str], s: Shape) -> str:
    cos, sin = tables
    t(f"{name}_cos", "Mul", x, cos)
    partner(t, f"{name}_partner", x, s)
    t(f"{name}_sin", "Mul", f"{name}_partner", sin)
    return t(f"{name}_turned", "Add", f"{name}_cos", f"{name}_sin")
