"""The examples on which guide and converted disagree most."""

from __future__ import annotations

from collections.abc import Sequence

from thesean.report.page.findings import Findings, Lost
from thesean.report.page.markup import element, paragraph, words


def lost_section(findings: Findings) -> str:
    if not findings.lost:
        return paragraph(findings.why.get("lost", "Nothing was compared."), "quiet")
    told = f"Of {findings.looked_at:,} examples those on which the outputs differ most, the worst first."
    images = any(not isinstance(item.shown, str) for item in findings.lost)
    items = "".join(_item(item, findings.unit) for item in findings.lost)
    return paragraph(told, "quiet") + element("ol", items, class_="lost images" if images else "lost")


def _item(item: Lost, unit: str) -> str:
    if isinstance(item.shown, str):
        shown = element("blockquote", words(item.shown))
    else:
        shown = _image(item.shown, f"example {item.number}")
    distance = f"example {item.number}{item.where}: {item.distance:.3g} {unit}".rstrip()
    answers = f"{element('b', 'guide')} {words(item.guide)}", f"{element('b', 'converted')} {words(item.converted)}"
    return element("li", shown + "".join(element("p", a) for a in answers) + paragraph(distance, "quiet"))


def _image(rows: Sequence[Sequence[float]], name: str) -> str:
    """A square a pixel, those of one level in a row as one."""
    drawn = []
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            level, start = round(255 * row[x]), x
            while x < len(row) and round(255 * row[x]) == level:
                x += 1
            fill = f"#{level:02x}{level:02x}{level:02x}"
            drawn.append(element("rect", "", x=start, y=y, width=x - start, height=1, fill=fill))
    return element(
        "svg", element("title", words(name)) + "".join(drawn), role="img", aria_label=name,
        viewBox=f"0 0 {len(rows[0])} {len(rows)}",
    )  # fmt: skip
