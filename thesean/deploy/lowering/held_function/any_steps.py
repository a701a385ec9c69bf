"""Held tokens at any number of steps: in blocks, unless none of them goes.

A text that begins here, and is no longer than what is held, is attended to as it is: blocks would choose among places
that are empty and steps that there aren't.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Sequence

from thesean.deploy.lowering.held_function.all_kept import all_kept
from thesean.deploy.lowering.held_function.in_blocks import in_blocks
from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.text import Text, choose


def any_steps(s: Shape, told: Sequence[str]) -> list[str]:
    """Any T. What it is told of who stays is of one step alone, and not read."""
    t = Text("n")
    t("steps", "Shape", "query_BTHC", start=1, end=2)
    t("few", "LessOrEqual", "steps", t.ints(s.all_places))
    t.slice("when", "marks_before", 0, 1, 2)
    t("latest", "ReduceMax", "when", keepdims=0)
    t("none_before", "Less", "latest", t.number(0.5))
    t("none_goes", "And", "few", "none_before")
    made = [f"{one.split()[-1]}_chunk" for one in told]
    t.lines.append(choose(made, "none_goes", told, {"whole": all_kept(s), "blocks": in_blocks(s)}))
    return t.lines
