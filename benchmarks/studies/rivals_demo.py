"""Published ways to a faster language model, and Thesean's, at equal measured latency and steps: the demo's GPT-2.

As `rivals.py`, with nats on held-out topics and the divergence from the guide. It has four blocks, so that a bound of
1.25 times its speed is what three of them meet. Rivals learn from the text and from the guide's logits at temperature
2, one to nine.
"""

from __future__ import annotations

from benchmarks.rivalry.meet import meet
from benchmarks.rivalry.subjects import demo
from benchmarks.rivalry.table import table
from benchmarks.suite import Case, Run


def bench(run: Run) -> None:
    meet(run, demo(run.settings))


CASE = Case(
    question="Published ways to a faster language model, at equal latency and steps: is ours at or above each?",
    minutes=30,
    unit="nats a character, ms",
    run=bench,
    settings={
        "rates": [3e-3, 1e-3, 3e-4], "steps": 100, "speedup": 1.25, "context": 256, "repeats": 40, "auto": True,
        "heads": 3, "widths": [448, 416, 384, 352, 320], "alone": [352, 320, 288, 256, 224], "attentions": [3, 2, 1],
        "batch": 4, "layers": None, "every": 2,
    },
    quick={
        "rates": [1e-3], "steps": 2, "context": 32, "repeats": 2, "auto": False, "widths": [], "alone": [],
        "attentions": [], "batch": 2, "layers": 2, "every": 80,
    },
    quick_only=("ours: copy", "ShortGPT"),
    seeds=(0, 1, 2),
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
)  # fmt: skip
