"""The first half of `make demo`, measured: a character GPT-2 becomes a recurrent network."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import language
from benchmarks.suite import Case, Result, Run
from thesean.report import read_report
from thesean.report.markdown import comparison
from thesean.report.report_json import report_rows


def bench(run: Run) -> None:
    from examples.demo_gpt2 import demo

    settings = dict(run.settings)
    guide = language.guide(settings.pop("layers"))
    for seed in run.seeds:
        with tempfile.TemporaryDirectory() as folder:
            keep_report(run, demo(guide, Path(folder), seed=seed, **settings), seed)


def keep_report(run: Run, report: Path, seed: int) -> None:
    """A demo's rows, and beside them all else that it tells but where it ran."""
    found = read_report(report)
    for row in found.pop("rows"):
        if run.wants(row["name"], seed):
            run.add(row.pop("name"), seed, **row)
    run.keep(**{key: value for key, value in found.items() if key not in ("environment", "seed")})


def table(result: Result) -> str:
    """Guide, conversion and baselines side by side, and the verdict."""
    rows = [{key: value for key, value in row.items() if key != "seed"} for row in result["cases"]]
    return comparison(report_rows({"rows": rows}), result["details"]["metric_name"])


CASE = Case(
    question="How does a converted GPT-2 compare with its guide, and with the same network from scratch and distilled?",
    minutes=6,
    unit="nats, ms",
    run=bench,
    settings={"steps": 250, "contexts": [64, 512, 2048], "every": 2, "characters": 200, "layers": None},
    quick={"steps": 2, "contexts": [8], "every": 40, "characters": 8, "layers": 1},
    needs=("onnxruntime", "transformers"),
    table=table,
)
