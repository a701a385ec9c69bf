"""The page: what became what, what was lost, how it was trained, what it costs, how to serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thesean.curve import Curve
from thesean.passes.plan.plan import Plan
from thesean.passes.plan.table import place_of, replaced_inside, target_of
from thesean.report.conversion import ConversionReport
from thesean.report.page.answers import answers_section
from thesean.report.page.charts import Axes, Line, chart, heatmap
from thesean.report.page.findings import Findings
from thesean.report.page.lost import lost_section
from thesean.report.page.markup import Names, element, figure, folded, paragraph, table, words
from thesean.report.page.picture import plan_picture
from thesean.report.page.serve import serve_section
from thesean.report.page.style import STYLE
from thesean.report.page.trade_offs import trade_off_section
from thesean.units import decimal, duration, milliseconds, quantity, times

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(plan: Plan, report: ConversionReport, findings: Findings, where: Mapping[str, Any]) -> str:
    """The whole document; `where` is the environment it was written in."""
    names = Names()
    title = _title(plan)
    sections = [
        ("Plan", plan_picture(plan, report) + _plan_tables(plan)),
        ("What was lost", lost_section(findings)),
        *([("As it answers", answers_section(findings.answers))] if findings.answers is not None else []),
        ("Training", _training(names, report)),
        ("Similarity", _similarity(names, findings)),
        ("Cost and quality", _cost(names, plan, report, findings)),
        ("Serve it", serve_section(findings.served)),
        ("Settings", _settings(report, where)),
    ]
    body = [element("header", _head(title, plan, report))]
    for heading, content in sections:
        name = names.new("section")
        body.append(element("section", element("h2", heading, id=name) + content, aria_labelledby=name))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        + element("title", words(f"{title} - Thesean"))
        + element("style", STYLE)
    )
    main = element("main", "\n".join(body))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{main}</body></html>\n'


def _title(plan: Plan) -> str:
    became = ", ".join(dict.fromkeys(p.target for p in plan.replaced))
    return f"{len(plan.replaced)} of {len(plan)} parts became {became}" if became else "The guide as it was"


def _head(title: str, plan: Plan, report: ConversionReport) -> str:
    divergence = report.converted.get("divergence")
    lead = f"{report.steps:,} optimizer steps, {duration(report.seconds)}"
    if divergence is not None:
        lead += f". On held-out data the outputs diverge from the guide's by {divergence:.3g}"
    figures = [
        (name, decimal(report.converted.get(name)), f"guide {decimal(report.guide.get(name))}")
        for name in ("loss", "metric")
        if report.converted.get(name) is not None
    ]
    figures.append(("parameters", quantity(report.params), f"guide {quantity(plan.params)}"))
    figures.append(("FLOPs a forward", quantity(report.flops), f"guide {quantity(plan.flops)}"))
    shown = "".join(
        element("div", element("dt", words(n)) + element("dd", words(v)) + element("dd", words(was), class_="was"))
        for n, v, was in figures
    )
    return (
        paragraph("A conversion by Thesean", "eyebrow")
        + element("h1", words(title))
        + paragraph(lead + ".", "lead")
        + element("dl", shown, class_="figures")
    )


def _plan_tables(plan: Plan) -> str:
    rows = [
        (
            p.path,
            target_of(p) + (f", {inside}" if (inside := replaced_inside(p)) else ""),
            p.operators or "-",
            quantity(p.params),
            quantity(p.new_params if not p.kept else p.params),
            quantity(p.flops),
            quantity(p.new_flops if not p.kept else p.flops),
        )
        for p in plan
    ]
    heads = ("part", "became", "computes", "parameters", "after", "FLOPs", "after")
    sizes = ", ".join(f"{k} {v}" for k, v in plan.sizes.items())
    return folded("The plan as a table", table(f"Parts in order; FLOPs at {sizes or 'its sizes'}", heads, rows))


def _training(names: Names, report: ConversionReport) -> str:
    if not report.stages and not report.curves:
        return paragraph("Nothing was trained, and no stage is recorded.", "quiet")
    figures = []
    if len(report.stages) > 1:
        for title, key in (("Distance from the guide", "divergence"), ("Loss", "loss"), ("Metric", "metric")):
            points = [(row.replaced, v) for row in report.stages if (v := getattr(row, key)) is not None]
            if not points:
                continue
            if (start := report.guide.get(key)) is not None:
                points.insert(0, (0, start))
            told = "after each stage, before the whole is tuned"
            line = Line(name=key, points=points, dots=True)
            drawn = chart(names, title, f"{title} {told}", Axes(x="parts replaced", y=key), [line])
            figures.append(figure(title, told, drawn))
    rows = [
        (
            row.part, f"{row.replaced} of {row.of}", row.measure, decimal(row.before), decimal(row.after),
            decimal(row.loss), decimal(row.metric), decimal(row.divergence), f"{row.steps:,}", duration(row.seconds),
            row.stopped_by,
        )
        for row in report.stages
    ]  # fmt: skip
    heads = (
        "part", "replaced", "measure", "before", "after", "loss", "metric", "divergence", "steps", "time", "ended by",
    )  # fmt: skip
    curves = [
        (f"{c.phase} {c.part or ''}".strip(), f"{c.learning_rate:g}", c.steps, c.kept, *_ends(c.held_out))
        for c in report.curves
    ]
    told = element("div", "".join(figures), class_="grid") if figures else ""
    told += "".join(_run(names, curve) for curve in _drawn(report.curves))
    if rows:
        told += folded("The stages as a table", table("After each stage, on held-out data", heads, rows))
    if curves:
        columns = ("run", "rate", "steps", "kept step", "held out at first", "at last", "least")
        told += folded("The runs as a table", table("Runs of the optimizer", columns, curves))
    return told


def _drawn(curves: Sequence[Curve]) -> Sequence[Curve]:
    """Runs that something went on from; the others, trials of a learning rate, are rows of the table."""
    return [c for c in curves if c.kept] or curves[-1:]


def _run(names: Names, curve: Curve) -> str:
    """Held-out and training losses, which are other sums: each on an axis of its own."""
    title = f"{curve.phase} {curve.part or ''}".strip()
    marked = next((i for i, (step, _) in enumerate(curve.held_out) if step == curve.kept), None)
    held = Line(name="held out", points=curve.held_out, dots=len(curve.held_out) <= 30, marked=marked)
    steps = Line(name="training", points=[(i * curve.every, v) for i, v in enumerate(curve.losses)], kind="quiet")
    told = f"rate {curve.learning_rate:g}. Solid: held out, with a ring at step {curve.kept}, kept. Dashed: training."
    axes = Axes(x="step", y="loss")
    drawn = chart(names, f"{title}, held out", str(curve), axes, [held])
    drawn += chart(names, f"{title}, training", "mean loss of the steps", axes, [steps])
    return figure(title, told, element("div", drawn, class_="grid") if drawn else "")


def _ends(held_out: tuple[tuple[int, float], ...]) -> tuple[str, str, str]:
    values = [v for _, v in held_out]
    return (decimal(values[0]), decimal(values[-1]), decimal(min(values))) if values else ("-", "-", "-")


def _similarity(names: Names, findings: Findings) -> str:
    alike = findings.alike
    if alike is None:
        return paragraph(findings.why.get("alike", "Not measured."), "quiet")
    told = (
        f"Debiased CKA at the parts' exits, over {alike.rows} rows: guide downwards, converted across. 1 is the same "
        "up to rotation and scale."
    )
    drawn = heatmap(names, "Similarity of guide and converted", told, alike.matrix)
    rows = [
        (f"{i}. {part}", *(decimal(v, 3) for v in row))
        for i, (part, row) in enumerate(zip(alike.parts, alike.matrix, strict=True), 1)
    ]
    heads = ("guide", *(f"{i}" for i in range(1, len(alike.parts) + 1)))
    return (
        figure("Guide and converted, part by part", told, drawn)
        + folded("Similarities as a table, with the parts' names", table("CKA; columns: converted", heads, rows))
        + (paragraph(alike.note, "quiet") if alike.note else "")
    )


def _cost(names: Names, plan: Plan, report: ConversionReport, findings: Findings) -> str:
    """Quality against latency where it was measured, else against FLOPs."""
    if findings.trade_offs is not None:
        told = trade_off_section(names, findings.trade_offs)
        return told + _probed(names, plan) + _planned_latency(plan)
    told = _frontier(names, plan, report) + _probed(names, plan)
    if plan.latencies:
        return told + _planned_latency(plan)
    return told + paragraph("Latency wasn't measured when this was planned: cost is told in FLOPs.", "quiet")


def _frontier(names: Names, plan: Plan, report: ConversionReport) -> str:
    """Hybrids of the frontier: quality after each stage against what one forward costs."""
    key = "loss" if report.converted.get("loss") is not None else "divergence"
    points = [("guide", plan.flops, report.guide.get(key))]
    points += [(f"{row.replaced} replaced", row.flops, getattr(row, key)) for row in report.stages]
    points.append(("converted", report.flops, report.converted.get(key)))
    found = [(name, flops, value) for name, flops, value in points if value is not None]
    told = ""
    if len(found) > 1:
        line = Line(
            name=key,
            points=[(flops, value) for _, flops, value in found],
            dots=True,
            joined=False,
            marked=len(found) - 1,
            labels=[name for name, _, _ in found],
            named=(0, len(found) - 1),
        )
        caption = f"{key} against FLOPs of a forward: guide, the hybrid after each stage, and (ring) what was chosen"
        axes = Axes(x="FLOPs a forward", y=key, whole=False)
        told += figure("Every stop on the way", caption, chart(names, "Cost and quality", caption, axes, [line]))
        rows = [(name, quantity(flops, "FLOP"), decimal(value)) for name, flops, value in found]
        told += folded("These points as a table", table("Cost and quality", ("network", "cost", key), rows))
    return told


def _planned_latency(plan: Plan) -> str:
    if not plan.latencies:
        return ""
    measured = [
        (
            place_of(m), milliseconds(m.guide_ms), milliseconds(m.plan_ms), times(m.guide_ms, m.plan_ms) or "-",
            milliseconds(m.ceiling_ms), milliseconds(m.cache_floor_ms),
        )
        for m in plan.latencies
    ]  # fmt: skip
    heads = ("situation", "guide", "plan", "faster", "ceiling", "cache's floor")
    return table("Latency in onnxruntime, one thread, when it was planned", heads, measured)


def _probed(names: Names, plan: Plan) -> str:
    """What target "auto" tried: each candidate alone in its part."""
    timed = sorted((c for c in plan.candidates if c.added_ms is not None), key=lambda c: c.chosen)
    drawn = ""
    if timed:
        caption = "divergence of the guide with one part replaced against the latency that this adds; filled: chosen"
        lines = [
            Line(
                name=name,
                points=[(c.added_ms or 0.0, c.divergence) for c in timed if c.chosen == chosen],
                kind=kind,
                dots=True,
                joined=False,
                labels=[f"{c.path}: {c.target}" for c in timed if c.chosen == chosen],
            )
            for name, kind, chosen in (("tried", "hollow", False), ("chosen", "main", True))
        ]
        axes = Axes(x="ms added", y="divergence", whole=False)
        drawn = figure("Candidates", caption, chart(names, "Candidates", caption, axes, lines))
    if not plan.candidates:
        return ""
    rows = [
        (
            c.path, c.target, f"{c.divergence:.4g}", "-" if c.added_ms is None else f"{c.added_ms:+.3g} ms",
            quantity(c.params), quantity(c.flops), "yes" if c.chosen else "no",
        )
        for c in plan.candidates
    ]  # fmt: skip
    heads = ("part", "candidate", "divergence", "added", "parameters", "FLOPs", "chosen")
    return drawn + folded("Candidates as a table", table("What target auto tried", heads, rows))


def _settings(report: ConversionReport, where: Mapping[str, Any]) -> str:
    settings = [("seed", report.seed), ("length trained at", report.train_length or "-"), *_flat(report.recipe)]
    notes = element("ul", "".join(element("li", words(n)) for n in report.notes), class_="notes")
    return (
        (element("h3", "Notes of the run") + notes if report.notes else "")
        + folded("Recipe and seed", table("Settings", ("setting", "value"), settings))
        + folded(
            "Where this page was written",
            table("Environment", ("what", "value"), [(k, "-" if v is None else v) for k, v in where.items()]),
        )
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", "-" if value is None else value))
    return found
