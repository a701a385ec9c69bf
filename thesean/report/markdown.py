"""A report as a Markdown table with its provenance, for a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thesean.report.report_json import report_rows
from thesean.report.table import Row, lines, sort_rows, verdict


def markdown_table(report: Mapping[str, Any]) -> str:
    """The table, the verdict, and a line with machine, versions, commit and seeds. No trailing newline.

    `report` is what `read_report` returns; "metric_name" and "seed" or "seeds" are read from it when they are there.
    Raises ArtifactError for rows that aren't of this version.
    """
    return f"{comparison(report_rows(report), str(report.get('metric_name', 'metric')))}\n\n{provenance(report)}"


def comparison(rows: Sequence[Row], metric_name: str) -> str:
    """The table and the verdict alone."""
    rows = sort_rows(rows)
    written = [
        "| | " + " | ".join(row.name for row in rows) + " |",
        "|---|" + "---:|" * len(rows),
        *(f"| {_cell(label)} | " + " | ".join(map(_cell, cells)) + " |" for label, cells in lines(rows, metric_name)),
        "",
        verdict(rows),
    ]
    return "\n".join(written)


def provenance(report: Mapping[str, Any]) -> str:
    """ "Measured on <cpu>, AVX2, 2 cores, 1 thread, Python 3.11.7, torch 2.13.0, commit abc, seed 0, 2026-01-01.\""""
    found = report["environment"]
    facts = [str(found[name]) for name in ("cpu", "instructions") if found.get(name)]
    for key, one in (("cores", "core"), ("threads", "thread")):
        if found.get(key) is not None:
            facts.append(f"{found[key]} {one}" + ("" if found[key] == 1 else "s"))
    facts += [
        f"{'Python' if name == 'python' else name} {found[name]}"
        for name in ("python", "torch", "onnxruntime", "transformers")
        if found.get(name)
    ]
    if found.get("commit"):
        facts.append(f"commit {found['commit']}")
    if report.get("seeds") is not None:
        facts.append("seeds " + " ".join(map(str, report["seeds"])))
    elif report.get("seed") is not None:
        facts.append(f"seed {report['seed']}")
    if found.get("date"):
        facts.append(str(found["date"])[:10])
    return f"Measured on {', '.join(facts)}." if facts else "Measured on a machine that the report doesn't name."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
