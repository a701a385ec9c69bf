"""Small conversions that one process and several do alike: `python -m tests.rank_cases FILE NAME...` in each rank.

In double: Adam divides a gradient by its size, so that in single precision a bias whose gradient is 0 but for rounding
(one before a batch norm) would go different ways.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from tests import models


def cross_entropy(output: Any, batch: Any) -> torch.Tensor:
    """Over the labels that count, of which each rank has another number."""
    return F.cross_entropy(output, batch[1], ignore_index=0)


def batches(rows: int = 16, count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels that can be learnt, so that what was trained is what is kept."""
    inputs = [models.vectors(rows, 8, seed=k).double() for k in range(count)]
    return [(x, x[:, :5].argmax(1)) for x in inputs]


def vectors(measure: Any = "nmse", schedule: str = "joint", rows: int = 16, steps: int = 8, **alignment: Any) -> Any:
    """An MLP's parts, aligned and then fine-tuned."""
    align = {"schedule": schedule, "measure": measure, "share": 0.5, "check_every": 2, "ceiling": 0, **alignment}
    tuned = {"learning_rate": 3e-3, "distillation": 0.1, "anneal_until": 1.0}
    recipe: dict[str, Any] = {"steps": steps, "warmup": 1, "alignment": align, "fine_tuning": tuned}
    recipe |= {"closed_form": {"enabled": False}}  # what is solved here is nearer than so few steps would lead
    return models.mlp().double(), "mlp", {"data": batches(rows), "loss": cross_entropy, "recipe": recipe}


def padded() -> Any:
    """Rows of which each rank hides as many steps as it happens to."""
    data = []
    for seed in range(4):
        ids = models.tokens(6, 8, seed)
        lengths = torch.tensor([8, 3, 8, 8, 5, 8]) if seed % 2 else torch.full((6,), 8)
        data.append({"input_ids": ids, "attention_mask": (torch.arange(8) < lengths[:, None]).long()})
    recipe = {"steps": 4, "warmup": 1, "alignment": {"share": 0.5}, "fine_tuning": {"learning_rate": 1e-3}}
    return models.bert().double(), "rnn", {"data": data, "granularity": "sublayer", "recipe": recipe}


def normed() -> Any:
    """Replacements with batch norms, recalibrated as well."""
    model, _, given = vectors(recalibrate=True)
    return model, thesean.Target("mlp", hidden_norm="batch"), given


CASES: dict[str, Any] = {
    "closed form": lambda: (models.mlp().double(), "mlp", {"data": batches(), "loss": cross_entropy, "recipe": "fast"}),
    "cka, joint": lambda: vectors("cka"),
    "dmnn, joint": lambda: vectors("dmnn"),
    "mse, progressive, uneven": lambda: vectors("mse", "progressive", rows=13),
    "nmse, sequential": lambda: vectors("nmse", "sequential", order="back-to-front"),
    "cka and output, independent": lambda: vectors({"cka": 1.0, "nmse": 0.5}, "independent", output="kl"),
    "stochastic": lambda: vectors(schedule="stochastic"),
    "padded": padded,
    "batch norms": normed,
}


def result(name: str, **more: Any) -> dict[str, Any]:
    """What a conversion came to: numbers that don't depend on how long it took."""
    model, target, given = CASES[name]()
    converted = thesean.compile(model, target, progress=False, **given, **more)
    report = converted.report
    return {
        "weights": {k: v.detach().clone() for k, v in converted.module.state_dict().items()},
        "notes": report.notes,
        "losses": [loss for curve in report.curves for loss in curve.losses],
        "held out": [value for curve in report.curves for _, value in curve.held_out],
        "stages": [stage.divergence for stage in report.stages],
        "final": [v for v in report.converted.values() if v is not None],
    }


def main(path: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    found = {name: result(name) for name in names}
    torch.save(found, path)


if __name__ == "__main__":
    import os

    main(f"{sys.argv[1]}.{os.environ['RANK']}", sys.argv[2:])
