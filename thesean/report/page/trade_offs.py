"""Quality against latency as charts: in a page, and as a file of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thesean.errors import DataError
from thesean.passes.plan.svg import check_format
from thesean.report.page.chart_file import Panel, write_charts
from thesean.report.page.charts import Axes, Line
from thesean.report.points import Place, Points, TradeOff

LEGEND = "dashed: the Pareto front; ring: a conversion; black: the guide; hollow: a hybrid; square: int8 or less"


def draw(found: Points, path: Path, batch: int | None, lengths: Sequence[int] | None) -> Path:
    check_format(path)
    panels = [panel(found, place) for place in chosen(found, batch, lengths)]
    title = f"{found.quality} against latency, onnxruntime, one thread"
    return write_charts(path, title, [LEGEND], panels)


def chosen(found: Points, batch: int | None = None, lengths: Sequence[int] | None = None) -> list[Place]:
    """The places to draw. Raises DataError where none is left."""
    batches = list(dict.fromkeys(b for _, _, b in found.places))
    rows = batch if batch is not None else next(iter(batches), None)
    here = [place for place in found.places if place[2] == rows]
    sizes = [length for _, length, _ in here if length is not None]
    wanted = set(lengths) if lengths is not None else {min(sizes), max(sizes)} if sizes else set()
    places = [place for place in here if place[1] is None or place[1] in wanted]
    if not places:
        told = f"batch {rows}" if lengths is None else f"batch {rows} and lengths {', '.join(map(str, lengths))}"
        measured = ", ".join(_told(place) for place in found.places) or "nothing"
        raise DataError(f"nothing was measured at {told}; there is: {measured}.")
    return places


def panel(found: Points, place: Place) -> Panel:
    """One chart: every point that has both figures, and the front."""
    points = [(p, ms, q) for p in found if (ms := p.at(place)) is not None and (q := found.of(p)) is not None]
    best = found.optimal(place)
    front = Line(name="front", points=[(p.at(place) or 0.0, found.of(p) or 0.0) for p in best], kind="quiet")
    rank = {p.name: n for n, p in enumerate(best)}
    lines = [front]
    # the most wanted labels first: they take the room
    for point, ms, quality in sorted(points, key=lambda each: _wanted(each[0], rank)):
        lines.append(
            Line(
                name=point.name,
                points=[(ms, quality)],
                kind="guide" if point.kind == "guide" else "main" if point.name in rank else "hollow",
                dots=True,
                squares=point.form != "float32",
                marked=0 if point.kind == "converted" else None,
                labels=[point.name],
                named=(0,),
            )
        )
    axes = Axes(x="milliseconds", y=found.quality, whole=False, ratios=True)
    return Panel(title=f"{found.quality}: {_told(place)}", axes=axes, lines=lines)


def _wanted(point: TradeOff, rank: dict[str, int]) -> tuple[bool, bool, bool]:
    exact = point.form == "float32"
    return not (exact and point.kind != "hybrid"), point.name not in rank, not exact


def _told(place: Place) -> str:
    call, length, batch = place
    told = {"token": f"a token after {length}", "prefill": f"a prefill of {length} tokens", "forward": "one forward"}
    return f"{told[call]}, batch {batch}"
