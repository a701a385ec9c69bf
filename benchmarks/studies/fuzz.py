"""Does a saved folder stay data, whatever stands in it? Real ones are altered, loaded, called, saved and loaded again.

Each run takes a folder that some version wrote, changes it (`fuzzing/altered.py`) and tries it (`fuzzing/trial.py`). It
is "refused" (ArtifactError), "loaded", or "late": it loads, and torch refuses the call, as a value out of a table's
range does. Faults are "foreign" (another error), "wrong" (saved and loaded again it gives something else), "executed"
or "changed" (what a folder may not do), and "died": a signal, no answer in time, or more memory than is given.

What comes by something new is altered further (`fuzzing/campaign.py`). A run is a chain of numbers, tried again by
`python -m benchmarks.fuzzing.trial 12 345`. `--minutes 60` stops after an hour, and the same command goes on;
`--seeds 3` runs other numbers.
"""

from __future__ import annotations

from collections import Counter

from benchmarks.fuzzing.campaign import FAULTS, KINDS, Chain, Corpus, outcomes, warm_up
from benchmarks.suite import Case, Result, Run


def bench(run: Run) -> None:
    warm_up()
    for seed in run.seeds:
        corpus = Corpus()
        kept = run.details.get(f"corpus {seed}")
        if kept:  # goes on: what was come by is found again
            outcomes([tuple(map(int, text.split())) for text in kept], corpus=corpus)
        for block in range(run.settings["blocks"]):
            name = f"runs {seed}.{block}"
            if not run.wants(name, seed):
                continue
            first = seed * 10**9 + block * run.settings["runs"]
            found = outcomes(range(first, first + run.settings["runs"]), corpus=corpus)
            counts = Counter(text.partition(":")[0].partition(",")[0] for text in found.values())
            bad = {_text(c): text for c, text in found.items() if text.startswith(FAULTS)}
            run.add(name, seed, **counts, kept=len(corpus.chains), reached=len(corpus.seen), faults=bad)
            run.keep(**{f"corpus {seed}": list(map(_text, corpus.chains))})
            for chain, text in bad.items():
                run.fault(f"run {chain}: {text}")


def _text(chain: Chain) -> str:
    return " ".join(map(str, chain))


def table(result: Result) -> str:
    """Every row's runs, by what came of them."""
    total = {k: sum(c.get(k, 0) for c in result["cases"]) for k in KINDS}
    runs, last = sum(total.values()), {c["seed"]: c for c in result["cases"]}
    cells = [f"{runs:,}", *(f"{total[k]:,}" for k in KINDS)]
    cells += [f"{sum(c[k] for c in last.values()):,}" for k in ("kept", "reached")]
    heads = ["runs", *KINDS, "kept as seeds", "pairs of branches"]
    return "\n".join(("| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads), "| " + " | ".join(cells) + " |"))


CASE = Case(
    question="Does a saved folder stay data, whatever stands in it?",
    minutes=250,
    unit="runs",
    run=bench,
    settings={"blocks": 1000, "runs": 1000},
    quick={"blocks": 1, "runs": 40},
    needs=("transformers",),
    partial=True,
    table=table,
)
