"""How many nodes is one step of each family, what does a step cost, and what do the passes on the graph buy?

The demo's shape, untrained, each family and the guide with its cache, written twice: as it is exported, and without
`thesean.deploy.lowering.lean`. All files take turns in one process on one thread; times are of the CPU, so that other
processes don't count: medians and minima of one token at 64 remembered, of the same for 8 rows, and of a prompt.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import thesean
from benchmarks.suite import Case, Result, Run
from thesean.deploy.lowering import to_onnx
from thesean.deploy.session import Session

VOCABULARY, REMEMBERED = 96, 64
TARGETS: dict[str, Any] = {
    "the guide with its cache": None,
    "linear-attention": thesean.Target("linear-attention", window=0),
    "linear-attention, window and sinks": thesean.Target("linear-attention", window=64, sinks=4),
    "linear-attention, window": thesean.Target("linear-attention", window=64, sinks=0),
    "bounded-attention, 64 tokens": thesean.Target("bounded-attention", window=32, kept=32),
    "gru": "gru",
    "mingru": "mingru",
    "delta": "delta",
    "ssm": "ssm",
    "conv": "conv",
}


def _nothing(model: Any, portable: bool = False) -> None:
    """No pass."""


@contextmanager
def without_passes() -> Iterator[None]:
    passes = to_onnx.leaner
    to_onnx.leaner = _nothing
    try:
        yield
    finally:
        to_onnx.leaner = passes


def writer(target: Any, width: int, layers: int) -> Callable[[Path], object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=1024, n_embd=width, n_layer=layers, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    data = [{"input_ids": torch.randint(0, VOCABULARY, (4, 96))}]
    if target is None:
        return lambda path: thesean.export_guide(model, path, data=data)
    converted = thesean.compile(model, target, data=data, recipe="fast", progress=False)
    return lambda path: converted.export(path, stateful=True)


def nodes(path: Path) -> int:
    """What runs at one token: functions written out, of two branches the first, constants left out."""
    import onnx_ir as ir

    model = ir.load(path)

    def count(graph: Any) -> int:
        total = 0
        for node in graph:
            function = model.functions.get(node.op_identifier())
            if function is not None:
                total += count(function)
            elif node.op_type == "If":
                total += 1 + count(node.attributes["then_branch"].value)
            else:
                total += node.op_type != "Constant"
        return total

    return count(model.graph)


class Timed:
    """Calls of one file: a token of `batch` rows after REMEMBERED, and a prompt of one."""

    def __init__(self, path: Path, batch: int, prompt: int) -> None:
        self.session = Session(path)
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (batch, REMEMBERED))
        self.one = self._step(tokens[:1])
        self.many = self._step(tokens)
        long = np.random.default_rng(1).integers(0, VOCABULARY, (1, prompt))
        self.prompt = lambda: self.session.run({"input_ids": long})

    def _step(self, tokens: np.ndarray) -> Callable[[], object]:
        state: Any = None
        for at in range(2):  # a window of as many tokens is full, and some have left it
            _, state = self.session.run({"input_ids": tokens}, state if at else None)
            if any(name.startswith("past") for spec in self.session._table.shapes.values() for name in map(str, spec)):
                break
        return lambda: self.session.run({"input_ids": tokens[:, :1]}, state)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return 1e3 * (time.process_time() - start) / repeats


def measure(run: Run) -> None:
    settings = run.settings
    wanted = [name for name in TARGETS if run.wants(name)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights don't matter here
        files: dict[tuple[str, str], Timed] = {}
        counts: dict[str, dict[str, float]] = {}
        for name in wanted:
            shallow, deep = (writer(TARGETS[name], settings["width"], n) for n in (1, settings["layers"]))
            counts[name] = {}
            for kind in ("lean", "plain"):
                with warnings.catch_warnings() if kind == "lean" else without_passes():
                    paths = [Path(folder) / f"{len(files)}-{depth}.onnx" for depth in ("shallow", "deep")]
                    shallow(paths[0])
                    deep(paths[1])
                few, all_ = map(nodes, paths)
                counts[name][kind] = (all_ - few) / max(settings["layers"] - 1, 1)
                files[name, kind] = Timed(paths[1], settings["batch"], settings["prompt"])
        times: dict[tuple[str, str], dict[str, list[float]]] = {key: {} for key in files}
        for turn in range(settings["rounds"]):
            for key in list(files)[:: 1 if turn % 2 else -1]:
                timed = files[key]
                for what, call, repeats in (
                    ("token", timed.one, 5),
                    ("rows", timed.many, 3),
                    ("prompt", timed.prompt, 1),
                ):
                    times[key].setdefault(what, []).append(milliseconds(call, repeats))
    for name in wanted:
        figures: dict[str, Any] = {}
        for kind in ("lean", "plain"):
            figures[f"{kind}_nodes"] = round(counts[name][kind], 1)
            for what, values in times[name, kind].items():
                figures[f"{kind}_{what}_ms"] = round(median(values), 4)
                figures[f"{kind}_{what}_least_ms"] = round(min(values), 4)
        run.add(name, **figures)


def table(result: Result) -> str:
    lines = [
        "| network | nodes a layer | ms a token | ms for 8 rows | ms for a prompt |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["cases"]:
        cells = [f"{row['lean_nodes']:.0f} (was {row['plain_nodes']:.0f})"]
        cells += [f"{row[f'lean_{w}_ms']:.3f} ({row[f'plain_{w}_ms']:.3f})" for w in ("token", "rows", "prompt")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


CASE = Case(
    question="How many nodes is a step of each family, what does it cost, and what do the passes on the graph buy?",
    minutes=6,
    unit="ms",
    run=measure,
    settings={"width": 128, "layers": 4, "batch": 8, "prompt": 256, "rounds": 60},
    quick={"width": 16, "layers": 2, "batch": 2, "prompt": 8, "rounds": 2},
    quick_only=("linear-attention",),
    needs=("onnx", "onnx_ir", "onnxruntime", "onnxscript", "transformers"),
    table=table,
)
