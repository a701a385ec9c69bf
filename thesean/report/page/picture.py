"""The plan as a line of stops, each with what it became and where its weights came from."""

from __future__ import annotations

from thesean.passes.plan.plan import Plan
from thesean.passes.plan.rows import PlannedPart
from thesean.passes.plan.table import replaced_inside, target_of
from thesean.report.conversion import ConversionReport
from thesean.report.page.markup import element, paragraph, words
from thesean.units import quantity


def plan_picture(plan: Plan, report: ConversionReport) -> str:
    """From input to output; a square is a replacement, a ring the guide's own part."""
    stops = "".join(_stop(part, report) for part in plan)
    legend = "From input to output. A filled square was replaced, a ring stays the guide's."
    return paragraph(legend, "quiet") + element("ol", stops, class_="plan")


def _stop(part: PlannedPart, report: ConversionReport) -> str:
    became = "kept" if part.kept else "became " + target_of(part)
    inside = replaced_inside(part)
    cost = quantity(part.params) if part.kept else f"{quantity(part.params)} \u2192 {quantity(part.new_params)}"
    told = became + (f", {inside}" if inside else "")
    row = element("span", words(part.path), class_="path") + element("span", words(told), class_="became")
    chips = element("li", words(f"{cost} parameters"), class_="cost")
    chips += "".join(
        element("li", element("b", words(kind)) + words(f" {what}"), class_="chip")
        for kind, what in weights_of(part, report)
    )
    drawn = element("div", row, class_="row") + element(
        "ul", chips, class_="from", aria_label="what it costs, and where its weights came from"
    )
    return element("li", drawn, class_="kept" if part.kept else "new")


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
    aligned = sum(c.kept for c in report.curves if c.phase == "align" and c.part not in others)
    if aligned:
        found.append(("trained", "at its exit"))
    if tuned:
        found.append(("trained", "with the whole"))
    return found
