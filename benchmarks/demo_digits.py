"""The second half of `make demo`, measured: a convnet on digits becomes a multilayer perceptron."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.demo import keep_report, table
from benchmarks.suite import Case, Run


def bench(run: Run) -> None:
    from examples.demo_digits import demo

    for seed in run.seeds:
        with tempfile.TemporaryDirectory() as folder:
            keep_report(run, demo(Path(folder), run.settings["steps"], seed), seed)


CASE = Case(
    question="How does a convnet turned MLP compare with its guide, and with the same MLP from scratch and distilled?",
    minutes=1,
    unit="nats, ms",
    run=bench,
    settings={"steps": 300},
    quick={"steps": 4},
    needs=("onnxruntime", "sklearn"),
    table=table,
)
