"""Attention and MLP replaced by one recurrent block: how near to the guide, and what else would have got there?

The demo's guide and a rotary one (of rotary.py), every block one `parallel-block` without a window: in closed form, and
after 250 and 1000 steps with the default recipe. Beside it, at equal steps and data: a gated recurrence of twice the
width in each block's place, the same network from scratch and by logit distillation, each at the better of two rates,
the guide itself trained on at two rates, and attention alone replaced, with taps, whose MLPs stay. Smaller blocks,
blocks with a window, and those whose neurons read their own step alone tell what each feature is for. Losses are nats
per held-out character, after the conversion.
"""

from __future__ import annotations

import copy
import time
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import thesean
from benchmarks import language
from benchmarks.studies.rotary import STUDY
from benchmarks.suite import Case, Result, Run
from thesean.distill.train import cosine

_NAMED = 8  # of what was not measured

RATES = (1e-3, 2e-3)
WARMUP = 20

BLOCK = thesean.Target("parallel-block", window=0)
SMALL = thesean.Target("parallel-block", window=0, taps=2, hidden=256)
OTHERS = {
    "parallel block, neurons hear nothing": thesean.Target("parallel-block", window=0, hears=False),
    "parallel block, no taps": thesean.Target("parallel-block", window=0, taps=0),
    "parallel block, 2 taps, 256 neurons": SMALL,
    "parallel block, window 32": thesean.Target("parallel-block", window=32),
}
TAPPED = thesean.Target("linear-attention", window=0, taps=4)
RECURRENCE = thesean.Target("mingru", scope="part", expand=2)


def experiments(steps: int, smaller: bool) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `language.convert`, and the steps that data are made for. `smaller` asks for closed forms
    and for blocks that lack a feature too.
    """
    fast = {"recipe": language.recipe("fast"), "steps": 0, "granularity": "block"}
    recipe = language.recipe(steps=steps)
    given = {"recipe": recipe, "steps": steps, "granularity": "block"}
    runs: dict[str, dict[str, Any]] = {}
    if smaller:
        runs |= {"parallel block, closed form": {"target": BLOCK, **fast}}
        runs |= {"attention alone, 4 taps, closed form": {"target": TAPPED, **fast}}
    runs[f"parallel block, {steps} steps"] = {"target": BLOCK, **given}
    runs[f"attention alone, 4 taps, {steps} steps"] = {"target": TAPPED, **given}
    for kind, rate in product(("scratch", "distillation"), RATES):
        name = f"parallel block, {kind}, rate {rate:g}, {steps} steps"
        runs[name] = {"target": BLOCK, **given, "kind": kind, "learning_rate": rate}
    runs[f"minGRU of twice the width, {steps} steps"] = {"target": RECURRENCE, **given}
    if smaller:
        runs |= {f"{name}, closed form": {"target": chosen, **fast} for name, chosen in OTHERS.items()}
        runs |= {f"{name}, {steps} steps": {"target": chosen, **given} for name, chosen in OTHERS.items()}
    return runs


def trained_on(
    guide: nn.Module, settings: dict[str, Any], held_out: list[Any], seed: int, rate: float
) -> dict[str, Any]:
    """The guide after as many steps on the task alone; the last state, as a cosine leaves it."""
    start, steps = time.monotonic(), settings["steps"]
    model = copy.deepcopy(guide).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step, (ids, wanted) in zip(range(steps), language.windows(settings, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps, WARMUP)
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {
        "loss": loss_of(model.eval(), held_out),
        "guide": loss_of(guide, held_out),
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
        "params": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def loss_of(model: nn.Module, held_out: list[Any]) -> float:
    """Mean over batches of one size."""
    losses = [F.cross_entropy(model(input_ids=x).logits.flatten(0, 1), y.flatten()).item() for x, y in held_out]
    return sum(losses) / len(losses)


def bench(run: Run) -> None:
    """The first seed of both guides comes first, the shorter budget before the longer one: where time is short, what is
    measured is the whole question once.
    """
    settings = run.settings
    held_out = language.held_out(settings["length"], settings["every"])
    guides = {"learned positions": language.guide(settings["layers"])}
    if settings["rotary"]:
        guides["rotary"] = STUDY.guide(settings["rotary"])
    for seed, budget, (positions, guide) in product(run.seeds, settings["budgets"], guides.items()):
        of_budget = experiments(budget, smaller=budget == min(settings["budgets"]))
        for name, arguments in of_budget.items():
            if not run.wants(f"{positions}: {name}", seed):
                continue
            given = dict(arguments)
            sizes = {**settings, "steps": given.pop("steps")}
            found = language.convert(guide, sizes, held_out, seed, **given)
            run.add(f"{positions}: {name}", seed, **found)
        for rate in RATES:
            name = f"{positions}: the guide trained on, rate {rate:g}, {budget} steps"
            if run.wants(name, seed):
                run.add(name, seed, **trained_on(guide, {**settings, "steps": budget}, held_out, seed, rate))


def table(result: Result) -> str:
    """A row a network, its median loss over seeds with the lowest and highest; then what was not measured."""
    cases = result["cases"]
    lines = ["| run | guide | parameters | loss | lowest | highest | seeds |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name in dict.fromkeys(case["name"] for case in cases):
        rows = [case for case in cases if case["name"] == name]
        losses = sorted(row["loss"] for row in rows)
        size, guide = f"{rows[0]['params'] / 1e6:.2f} M", f"{rows[0]['guide']:.4f}"
        found = " | ".join(f"{loss:.4f}" for loss in (losses[len(losses) // 2], losses[0], losses[-1]))
        lines.append(f"| {name} | {guide} | {size} | {found} | {len(rows)} |")
    left = [row["name"] for row in result["details"].get("left_out", ())]
    never = [name for name in dict.fromkeys(left) if all(case["name"] != name for case in cases)]
    if left:
        lines += ["", f"Of {len(left) + len(cases)} runs {len(left)} were not made."]
    if never:
        more = f"; and {len(never) - _NAMED} more" if len(never) > _NAMED else ""
        lines += ["", f"Not measured: {'; '.join(never[:_NAMED])}{more}."]
    return "\n".join(lines)


CASE = Case(
    question="Attention and MLP replaced by one recurrent block: how near to the guide, and what else gets there?",
    minutes=600,
    unit="nats a character",
    run=bench,
    settings={
        "budgets": [250, 1000], "batch": 4, "length": 256, "every": 1, "layers": None,
        "rotary": {"layers": 4, "width": 128, "guide_steps": 1500, "length": 256},
    },
    quick={"budgets": [2], "batch": 2, "length": 32, "every": 80, "layers": 1, "rotary": None},
    quick_only=(
        "learned positions: parallel block, closed form",
        "learned positions: parallel block, scratch, rate 0.001, 2 steps",
        "learned positions: the guide trained on, rate 0.001, 2 steps",
    ),
    seeds=(0, 1, 2),
    needs=("transformers",),
    table=table,
    partial=True,
)  # fmt: skip
