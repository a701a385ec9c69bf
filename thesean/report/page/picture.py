"""The plan as a line of stops, each with what it became and where its weights came from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import PlannedPart
from thesean.passes.plan.table import replaced_inside, target_of
from thesean.report.conversion import ConversionReport
from thesean.report.page.markup import element, paragraph, words
from thesean.units import quantity

# What comes again so many times is told once, of parts one after the other or of a few in turns: two are read faster
# than what they share. Longer turns than these are no pattern that one sees.
_FOLDED, _LONGEST = 3, 8

Said = tuple[str, str]  # of a part: what it became, and what else is told


def plan_picture(plan: Plan, report: ConversionReport) -> str:
    """From input to output; a square is a replacement, a ring the guide's own part."""
    parts = list(plan)
    said = [(_became(part), _told(part, report)) for part in parts]
    stops, at = "", 0
    while at < len(parts):
        turn, end = _again(said, at)
        for _, same in groupby(range(at, at + turn), said.__getitem__):
            first = list(same)
            paths = [parts[k].path for k in range(at, end) if (k - at) % turn + at in first]
            how = "" if len(first) == turn else f", {len(first)} of every {turn}"
            stops += _stop(paths, how, *said[first[0]])
        at = end
    legend = "From input to output. A filled square was replaced, a ring stays the guide's."
    return paragraph(legend, "quiet") + element("ol", stops, class_="plan")


def _again(said: Sequence[Said], at: int) -> tuple[int, int]:
    """How long the turn is that comes again from here, and where it ends to: the one that most parts are of, the
    shortest of those. One part by itself where none does.
    """
    turn, end = 1, at + 1
    for length in range(1, _LONGEST + 1):
        last = at + length
        while said[last : last + length] == said[at : at + length]:
            last += length
        if last - at >= _FOLDED * length and last > end:
            turn, end = length, last
    return turn, end


def _became(part: PlannedPart) -> str:
    if part.kept:
        return "kept"
    inside = replaced_inside(part)
    return f"became {target_of(part)}" + (f", {inside}" if inside else "")


def _told(part: PlannedPart, report: ConversionReport) -> str:
    """What it costs, and where its weights came from."""
    cost = quantity(part.params) if part.kept else f"{quantity(part.params)} \u2192 {quantity(part.new_params)}"
    return element("li", words(f"{cost} parameters"), class_="cost") + "".join(
        element("li", element("b", words(kind)) + words(f" {what}"), class_="chip")
        for kind, what in weights_of(part, report)
    )


def _stop(paths: Sequence[str], how: str, became: str, told: str) -> str:
    """One part, or several of which the same is told: a row, or as `how` says some of one."""
    several = len(paths) > 1
    name = f"{paths[0]} to {paths[-1]}{how}" if several else paths[0]
    what = f"{len(paths)} parts, each {became}" if several else became
    row = element("span", words(name), class_="path") + element("span", words(what), class_="became")
    drawn = element("div", row, class_="row") + element(
        "ul", told, class_="from", aria_label="what it costs, and where its weights came from"
    )
    return element("li", drawn, class_="kept" if became == "kept" else "new")


def weights_of(part: PlannedPart, report: ConversionReport) -> list[tuple[str, str]]:
    """Where a part's weights came from, as the report knows it: (kind, what)."""
    tuned = sum(c.kept for c in report.curves if c.part is None and c.phase != "align")
    if part.kept:
        return [("trained", "with the whole")] if tuned and part.params else []
    found = []
    copied = [name for path in dict.fromkeys((part.path, *part.replaces)) for name in report.copied.get(path, [])]
    if copied:
        found.append(("copied", ", ".join(dict.fromkeys(copied))))
    else:
        found.append(("new", "nothing was copied"))
    closed = report.recipe.get("closed_form")
    if report.stages and isinstance(closed, dict) and closed.get("enabled"):
        found.append(("solved", "last linear map"))
    others = {row.part for row in report.stages} - {part.path}  # a run of several parts has a name of its own
    aligned = sum(c.kept for c in report.curves if c.phase in ("align", "trial") and c.part and c.part not in others)
    if aligned:
        found.append(("trained", "at its exit"))
    if tuned:
        found.append(("trained", "with the whole"))
    return found
