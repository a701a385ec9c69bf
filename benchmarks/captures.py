"""Which operators do captures of the guides hold, and does the loader admit each of them?

A guide is captured, and its first target put in, untrained; graph by graph, each operator is looked up in the loader's
list and each argument in its range. What isn't admitted could not be saved.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import fx

from benchmarks.suite import Case, Result, Run
from benchmarks.zoo import LENGTH, specimens
from tests.guides import GUIDES
from thesean.errors import ArtifactError, TheseanError
from thesean.passes.capture.capture import capture
from thesean.passes.graph import graph_json
from thesean.passes.plan.hybrid import bound_positions, build_hybrid
from thesean.passes.plan.make_plan import make_plan


def guides() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], tuple[str, ...]]]:
    """Name, what makes the guide, what makes its inputs, targets."""
    for s in specimens():
        yield s.name, s.model, partial(s.inputs, 4, LENGTH, 0), s.targets
    for name, guide in GUIDES.items():
        yield f"tests: {name}", guide.model, guide.example, ()


def bench(run: Run) -> None:
    for name, model, inputs, targets in guides():
        if not run.wants(name):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                captured = capture(model(), inputs())
            except TheseanError as error:
                run.add(name, operators=[], refused=str(error).splitlines()[0])
                continue
            graphs = [captured.graph_module.graph]
            for target in targets:
                try:
                    hybrid = build_hybrid(make_plan(captured, target)).graph_module
                except TheseanError:
                    continue  # a target that doesn't fit this guide: the guide's own graph was looked at
                bound_positions(hybrid)
                graphs.append(hybrid.graph)
        found = sorted({name_of(n) for graph in graphs for n in graph.nodes if n.op == "call_function"})
        outside = sorted({text for graph in graphs if (text := not_admitted(graph))})
        run.add(name, graphs=len(graphs), operators=found, outside=outside)
        for text in outside:
            run.fault(f"{name}: {text}")


def name_of(node: fx.Node) -> str:
    try:
        return graph_json.target_name(node.target)
    except ArtifactError:
        return str(node.target)


def not_admitted(graph: fx.Graph) -> str:
    """Why the graph could not be loaded again, "" where it could."""
    try:
        graph_json.load(graph_json.dump(graph))
    except ArtifactError as error:
        return str(error)
    return ""


def table(result: Result) -> str:
    held = Counter(operator for case in result["cases"] for operator in case["operators"])
    outside = sum(bool(case.get("outside")) for case in result["cases"])
    return (
        "| guides | operators that they hold | guides with one that the loader refuses |\n|---:|---:|---:|\n"
        f"| {len(result['cases'])} | {len(held)} | {outside} |"
    )


CASE = Case(
    question="Does the loader admit what captures of the guides hold?",
    minutes=4,
    unit="operators",
    run=bench,
    quick_only=("policy and value", "tests: tied"),
    needs=("transformers",),
    table=table,
)
