"""Quality against latency as charts: in a page, with tables, and as a file of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thesean.errors import DataError
from thesean.passes.plan.svg import check_format
from thesean.report.page.chart_file import Panel, charts_as_svg, write_charts
from thesean.report.page.charts import Axes, Line, chart
from thesean.report.page.markup import Names, element, figure, folded, paragraph, table
from thesean.report.points import Place, Points, TradeOff
from thesean.units import decimal, milliseconds

LEGEND = "lower left is better; dashed: the Pareto front; ring: a conversion; hollow: beaten; square: quantised"


_HEIGHT = 260.0  # pixels of a chart


def draw(found: Points, path: Path, batch: int | None, lengths: Sequence[int] | None) -> Path:
    check_format(path)
    return write_charts(path, *_charts(found, batch, lengths))


def svg(found: Points, batch: int | None, lengths: Sequence[int] | None) -> str:
    return charts_as_svg(*_charts(found, batch, lengths))


def _charts(
    found: Points, batch: int | None, lengths: Sequence[int] | None
) -> tuple[str, Sequence[str], Sequence[Panel]]:
    title = f"{found.quality} against latency, onnxruntime, one thread"
    return title, [LEGEND], [panel(found, place) for place in chosen(found, batch, lengths)]


def trade_off_section(names: Names, found: Points) -> str:
    """Charts at the first number of rows, and all that was measured as tables."""
    drawn = []
    for place in chosen(found):
        one = panel(found, place)
        drawn.append(figure(one.title, "", chart(names, one.title, _described(found, place), one.axes, one.lines)))
    told = paragraph(f"{found.judged}. In the charts: {LEGEND}. Labels that had no room: rest on a point.", "quiet")
    tables = ""
    for batch in dict.fromkeys(b for _, _, b in found.places):
        heads, rows = found.table(batch)
        caption = f"Batch {batch}, onnxruntime, one thread, medians; * on the Pareto front of {found.quality}"
        tables += table(caption, ["network", *heads[1:]], rows)
    notes = "".join(paragraph(note, "quiet") for note in found.notes)
    return told + element("div", "".join(drawn), class_="grid") + folded("All that was measured", tables) + notes


def _described(found: Points, place: Place) -> str:
    """A chart for who can't see it: its front."""
    best = [f"{p.name}, {milliseconds(p.at(place))}, {decimal(found.of(p))}" for p in found.optimal(place)]
    return f"On the Pareto front, the fastest first: {'; '.join(best) or 'none'}."


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
        exact, whole = point.form == "float32", point.kind != "hybrid"
        lines.append(
            Line(
                name=point.name,
                points=[(ms, quality)],
                kind="guide" if point.kind == "guide" else "main" if point.name in rank else "hollow",
                dots=True,
                squares=not exact,
                marked=0 if point.kind == "converted" and exact else None,
                labels=[point.name],
                named=(0,) if point.name in rank or (exact and whole) else (),
                shy=not (exact and whole),
            )
        )
    axes = Axes(x="milliseconds", y=found.quality, whole=False, ratios=True, height=_HEIGHT)
    return Panel(title=f"{found.quality}: {_told(place)}", axes=axes, lines=lines)


def _wanted(point: TradeOff, rank: dict[str, int]) -> tuple[bool, bool, bool]:
    exact = point.form == "float32"
    return not (exact and point.kind != "hybrid"), point.name not in rank, not exact


def _told(place: Place) -> str:
    call, length, batch = place
    told = {"token": f"a token after {length}", "prefill": f"a prefill of {length} tokens", "forward": "one forward"}
    return f"{told[call]}, batch {batch}"
