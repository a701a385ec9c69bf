"""Which learning rate is each method's best on the digits demo? Guide, data and steps are the demo's.

python benchmarks/digits.py --out benchmarks/results/digits.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch

import thesean
from demo_digits import digits, recipe, train_guide
from thesean.report import environment

GRID = (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, held_out = digits()
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        guide = train_guide(data, seed)
        for rate in GRID:
            for method in ("converted", "scratch", "distillation"):
                common: dict[str, Any] = dict(
                    target="mlp", data=data, eval_data=held_out, loss=thesean.cross_entropy, metric=thesean.accuracy,
                    recipe=recipe(rate), seed=seed, progress=False,
                )  # fmt: skip
                if method == "converted":
                    model = thesean.compile(guide, **common)
                else:
                    model = thesean.baseline(guide, kind=method, **common)  # type: ignore[arg-type]
                figures = model.report.converted
                runs.append({"method": method, "rate": rate, "seed": seed, **figures})
    for method in ("converted", "scratch", "distillation"):
        for rate in GRID:
            losses = [r["loss"] for r in runs if r["method"] == method and r["rate"] == rate]
            print(
                f"{method:14s} {rate:g}  loss {statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
            )
    options.out.write_text(json.dumps({"runs": runs, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
