"""A plan as tables for people: the parts, what they cost in three forms, and what that means."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thesean.passes.plan.rows import PlanLatency, PlannedPart, PlanRows, ProbedCandidate
from thesean.units import quantity, times

_RIGHT = {"params", "FLOPs", "ms"}

_TITLE = "ms in onnxruntime, 1 thread, targets untrained; ceiling: the guide without the replaced parts"
_CACHED = (
    "token: the guide reads everything again; plan and ceiling are compared with the least that a key-value cache takes"
)

# Columns that fold when the table is too wide, the widest first
_FOLDS = {"part", "operators", "shape", "target", "note"}
_NAMES = ("part", "operators", "mixing", "shape", "params", "FLOPs", "ms", "target", "params'", "FLOPs'", "ms'", "note")


def render(plan: PlanRows, width: int = 140) -> str:
    """Plain text: one row a part and a line of totals, then latencies, then the notes. Empty columns are left out."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.out(_title(plan), highlight=False)
    console.print(_parts(plan, width))
    if plan.candidates:
        console.out(_CANDIDATES, highlight=False)
        console.print(candidates_table(plan.candidates))
    if plan.latencies:
        console.out(_TITLE, highlight=False)
        console.print(_latencies(plan.latencies))
        if any(v.cache_floor_ms is not None for v in plan.latencies):
            console.out(_CACHED, highlight=False)
    for note in [*_dropped_by_all(plan), *plan.notes]:
        console.out(textwrap.fill(note, width, initial_indent="- ", subsequent_indent="  "), highlight=False)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _title(plan: PlanRows) -> str:
    where = ", ".join(f"{k} {v}" for k, v in plan.sizes.items())
    measured = f"; ms {place_of(plan.latencies[0])}" if plan.latencies else ""
    return f"{len(plan.replaced)} of {len(plan)} parts replaced; FLOPs at {where}{measured}"


def _parts(plan: PlanRows, width: int) -> Table:
    first = plan.latencies[0] if plan.latencies else None
    common = bool(_dropped_by_all(plan))
    rows = [_row(part, common) for part in plan]
    total = [
        "whole model",
        "",
        "",
        "",
        quantity(plan.params),
        quantity(plan.flops),
        _ms(first.guide_ms if first else None),
    ]
    total += ["", quantity(plan.new_params), quantity(plan.new_flops), _ms(first.plan_ms if first else None), ""]
    everything = [*rows, total]
    shown = [i for i in range(len(_NAMES)) if any(row[i] for row in everything)]
    widths = {_NAMES[i]: max(len(_NAMES[i]), *(len(row[i]) for row in everything)) for i in shown}
    widths = _folded(widths, width)
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name, size in widths.items():
        right: Literal["left", "right"] = "right" if name.rstrip("'") in _RIGHT else "left"
        made.add_column(name, justify=right, overflow="fold", width=size)
    for row in rows:
        made.add_row(*(escape(row[i]) for i in shown))  # a name's brackets are no markup
    made.add_section()
    made.add_row(*(escape(total[i]) for i in shown))
    return made


def _folded(widths: dict[str, int], width: int) -> dict[str, int]:
    """Columns that fit side by side, two spaces apart; what must fold is the widest first. Rich would drop the last."""
    fitting = dict(widths)
    folding = [name for name in fitting if name in _FOLDS]
    while folding and sum(fitting.values()) + 2 * len(fitting) + 1 > width:
        widest = max(folding, key=fitting.__getitem__)
        if fitting[widest] <= 1:
            break
        fitting[widest] -= 1
    return fitting


def _row(part: PlannedPart, common: bool) -> list[str]:
    before = [quantity(part.params), quantity(part.flops), _ms(part.latency_ms)]
    after = (
        ["", "", ""] if part.kept else [quantity(part.new_params), quantity(part.new_flops), _ms(part.new_latency_ms)]
    )
    return [part.path, part.operators, part.mixing, _shape(part), *before, target_of(part), *after, _note(part, common)]


def _latencies(latencies: Sequence[PlanLatency]) -> Table:
    """The guide, the plan and the ceiling side by side; a guide that decodes also with the least a cache can take."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("measured", no_wrap=True)
    cached = any(v.cache_floor_ms is not None for v in latencies)
    columns = ["guide", *(["KV cache, at least"] if cached else []), "plan", "ceiling", "plan is", "at most"]
    for name in columns:
        made.add_column(name, justify="right")
    for v in latencies:
        rival = v.cache_floor_ms if v.cache_floor_ms is not None else v.guide_ms
        floor = [_ms(v.cache_floor_ms)] if cached else []
        speed = [times(rival, v.plan_ms), times(rival, v.ceiling_ms)]
        made.add_row(_measured(v), _ms(v.guide_ms), *floor, _ms(v.plan_ms), _ms(v.ceiling_ms), *speed)
    return made


def _measured(latency: PlanLatency) -> str:
    batch = f", batch {latency.batch}"
    if latency.kind == "forward":
        return f"forward{batch}"
    named = {"prefill": f"prefill of {latency.context}", "token": f"token after {latency.context}"}
    return named[latency.kind] + batch


def place_of(latency: PlanLatency) -> str:
    """Where single parts were measured."""
    tokens = "" if latency.context is None else f"at {latency.context} tokens, "
    return f"{tokens or 'at '}batch {latency.batch}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _shape(part: PlannedPart) -> str:
    first, second = (" x ".join(map(_dim, s)) for s in (part.input_shape, part.output_shape))
    return first if first == second else f"{first} -> {second}"


def _dim(size: int | str) -> str:
    """ "time", "(time + 1)"."""
    return f"({size})" if " " in str(size) else str(size)


def target_of(part: PlannedPart) -> str:
    """ "gru(width=8)"."""
    options = ", ".join(f"{k}={v}" for k, v in part.options.items())
    return part.target + (f"({options})" if options else "")


def replaced_inside(part: PlannedPart) -> str:
    """ "replaces attn" where a target takes the place of some of a part; nothing where it takes all of it."""
    if not part.replaces or part.replaces == (part.path,):
        return ""
    return "replaces " + ", ".join(r.removeprefix(part.path + ".") for r in part.replaces)


def _note(part: PlannedPart, common: bool) -> str:
    notes = []
    if part.keeps is not None:
        notes.append(f"of {len(part.members)} parts keeps {part.keeps}")
    if inner := replaced_inside(part):
        notes.append(inner)
    if part.drops and not common:
        notes.append("drops " + ", ".join(part.drops))
    return "; ".join(notes)


def _dropped_by_all(plan: PlanRows) -> list[str]:
    """Told once where every replacement drops the same side inputs."""
    drops = {part.drops for part in plan.replaced}
    common = next(iter(drops)) if len(drops) == 1 and len(plan.replaced) > 1 else ()
    return [f"no replacement reads {', '.join(common)} (a side input that is dropped)"] if common else []


_CANDIDATES = "divergence of the guide with this part alone replaced (and the ms that it adds); * is chosen"


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
        made.add_row(escape(path), *("" if c is None else _cell(c) for c in cells))
    return made


def _cell(candidate: ProbedCandidate) -> str:
    added = "" if candidate.added_ms is None else f" ({candidate.added_ms:+.2g})"
    return f"{'* ' if candidate.chosen else ''}{candidate.divergence:.2g}{added}"
