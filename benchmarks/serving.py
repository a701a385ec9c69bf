"""What does Session.generate add to a loop that calls run, and that to plain onnxruntime?

A decoder of the demo's shape, untrained, as it is (attentions kept, with a cache) and with linear attention; one row,
one thread, greedy and drawn. Milliseconds of a text, by turns; `ratio` is the median of each turn's own to `run`'s.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

import thesean
from benchmarks.suite import Case, Result, Run, percentiles
from thesean.deploy.sampling import SamplingOptions
from thesean.deploy.session import Session

VOCABULARY, PROMPT = 96, list(range(16))


def write(target: str, width: int, layers: int, path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=1024, n_embd=width, n_layer=layers, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    batch = {"input_ids": torch.randint(0, VOCABULARY, (4, 32))}
    if target == "keep":
        thesean.export_guide(model, path, data=[batch])
    else:
        thesean.compile(model, target, data=[batch], recipe="fast", progress=False).export(path)


def loops(path: Path, count: int) -> dict[str, Callable[[], object]]:
    import onnxruntime as ort

    session = Session(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    plain = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in plain.get_outputs()]

    def onnxruntime() -> list[int]:
        chunk, state, made = np.array([PROMPT]), dict(session.zero_state(1)), []
        for _ in range(count):
            outputs = dict(zip(names, plain.run(None, {"input_ids": chunk, **state}), strict=True))
            state = {name: outputs[name.replace("in", "out")] for name in state}
            chunk = outputs["logits"][:, -1:].argmax(-1)
            made.append(int(chunk[0, 0]))
        return made

    def run() -> list[int]:
        chunk, state, made = np.array([PROMPT]), None, []
        for _ in range(count):
            outputs, state = session.run({"input_ids": chunk}, state)
            chunk = outputs["logits"][:, -1:].argmax(-1)
            made.append(int(chunk[0, 0]))
        return made

    def greedy() -> list[int]:
        return session.generate(PROMPT, count)

    assert greedy() == run() == onnxruntime()
    drawn: SamplingOptions = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
    return {
        "onnxruntime": onnxruntime,
        "run": run,
        "generate": greedy,
        "generate, drawn": lambda: session.generate(PROMPT, count, seed=0, **drawn),
    }


def measure(run: Run) -> None:
    for target in ("keep", "linear-attention"):
        if not run.wants(f"{target}, run"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.onnx"
            write(target, run.settings["width"], run.settings["layers"], path)
            calls = loops(path, run.settings["tokens"])
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(run.settings["rounds"]):
                for name in list(calls)[:: 1 if turn % 2 else -1]:
                    start = time.perf_counter()
                    calls[name]()
                    times[name].append(1e3 * (time.perf_counter() - start))
        for name, values in times.items():
            ratio = median(own / base for own, base in zip(values, times["run"], strict=True))
            middle, low, high = (round(v, 3) for v in percentiles(values))
            run.add(f"{target}, {name}", median_ms=middle, p20_ms=low, p80_ms=high, ratio=round(ratio, 3))


def table(result: Result) -> str:
    rows = [f"| {row['name']} | {row['median_ms']} | {row['ratio']} |" for row in result["cases"]]
    return "\n".join(["| loop | ms a text | to run's |", "|---|---|---|", *rows])


CASE = Case(
    question="What does Session.generate add to a loop that calls run?",
    minutes=1.5,
    unit="ms",
    run=measure,
    settings={"width": 128, "layers": 4, "tokens": 128, "rounds": 60},
    quick={"width": 16, "layers": 1, "tokens": 4, "rounds": 2},
    needs=("onnx", "onnxruntime", "onnxscript", "transformers"),
    table=table,
)
