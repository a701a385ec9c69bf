"""What target "auto" tried, as a table for people: a row a part, a column a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from thesean.passes.plan import ProbedCandidate

TITLE = "divergence of the guide with this part alone replaced (and the ms that it adds); * is chosen"


def candidates_table(candidates: Sequence[ProbedCandidate]) -> Table:
    """Divergence in nats for logits, else the normalised MSE; empty where a candidate doesn't fit the part."""
    names = list(dict.fromkeys(c.target for c in candidates))
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("part", no_wrap=True)
    for name in names:
        made.add_column(name.replace("(", "\n("), justify="right", overflow="fold")
    found = {(c.path, c.target): c for c in candidates}
    for path in dict.fromkeys(c.path for c in candidates):
        cells = (found.get((path, name)) for name in names)
        made.add_row(path, *("" if c is None else _cell(c) for c in cells))
    return made


def _cell(candidate: ProbedCandidate) -> str:
    added = "" if candidate.added_ms is None else f" ({candidate.added_ms:+.2g})"
    return f"{'* ' if candidate.chosen else ''}{candidate.divergence:.2g}{added}"
