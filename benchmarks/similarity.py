"""CKA against the usual code, side by side: who is faster, and who is right.

Contenders take turns in one process, so that a busy machine slows all of them; a ratio is that of their medians. Times
are in milliseconds on one thread. Errors are against float64, of float32 features at an offset of 300.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import thesean
from benchmarks.suite import Case, Result, Run, turns
from thesean.kernels.cka import cka, prepare
from thesean.similarity import similarity
from thesean.similarity.shared.layer_cka import layer_cka

OURS = "thesean"

Contenders = dict[str, Callable[[], Any]]


def centred_autograd(x_NP: torch.Tensor, y_NQ: torch.Tensor) -> torch.Tensor:
    """What one writes by hand: centred features, two Grams, autograd."""
    x_NP, y_NQ = x_NP - x_NP.mean(0), y_NQ - y_NQ.mean(0)
    k_NN, l_NN = x_NP @ x_NP.mT, y_NQ @ y_NQ.mT
    return (k_NN * l_NN).sum() / (k_NN.norm() * l_NN.norm())


def hkh(x_NP: torch.Tensor, y_NQ: torch.Tensor) -> torch.Tensor:
    """The definition as most repositories have it."""
    n = x_NP.shape[0]
    h_NN = torch.eye(n, dtype=x_NP.dtype) - 1 / n
    k_NN, l_NN = h_NN @ (x_NP @ x_NP.mT) @ h_NN, h_NN @ (y_NQ @ y_NQ.mT) @ h_NN
    return (k_NN * l_NN).sum() / ((k_NN * k_NN).sum() * (l_NN * l_NN).sum()).sqrt()


def features(n: int, p: int, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    shared_NK = torch.randn(n, 16, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    return shared_NK @ torch.randn(16, p, generator=g) / 4 + torch.randn(n, p, generator=g) + offset


def training_step(
    loss: Callable[..., torch.Tensor], x_NP: torch.Tensor, y: Any, both: bool = True
) -> Callable[[], Any]:
    """Forward and backward, with fresh leaves over the same storage."""

    def run() -> None:
        own = x_NP.detach().requires_grad_()
        other = y.detach().requires_grad_(both) if isinstance(y, torch.Tensor) else y
        loss(own, other).backward()

    return run


class Replay(nn.Module):
    """Layers that put out given features: what is timed is the comparison alone."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.layers, self.outputs = nn.ModuleList(nn.Identity() for _ in layers), list(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, output in zip(self.layers, self.outputs, strict=True):
            x = layer(output)
        return x


def pairs_by_hkh(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([hkh(x, y) for x, y in product(a, b)]).view(len(a), len(b))


def one_pair(rounds: int, width: int, tall: int) -> Iterator[dict[str, Any]]:
    """Forward and backward of two sides of 256 examples and `width`, and of `tall` and 512."""
    x, y = features(256, width), features(256, width, seed=1)
    yield case(
        f"both sides, n=256 p=q={width}",
        {OURS: training_step(cka, x, y), "centred autograd": training_step(centred_autograd, x, y)},
        rounds,
        {"centred autograd": 1.3},
    )
    tall_x, tall_y = features(tall, 512), features(tall, 512, seed=1)
    yield case(
        f"both sides, n={tall} p=q=512",
        {OURS: training_step(cka, tall_x, tall_y), "H K H": training_step(hkh, tall_x, tall_y)},
        max(3, rounds // 6),
        {"H K H": 2.0},
    )
    guide = prepare(y, student_width=x.shape[1])
    yield case(
        f"student only, cached guide, n=256 p=q={width}",
        {
            OURS: training_step(cka, x, guide),
            "centred autograd": training_step(centred_autograd, x, y),
            "centred autograd, guide detached": training_step(centred_autograd, x, y, both=False),
        },
        rounds,
        {"centred autograd": 2.5},
    )


def all_layers(rounds: int, count: int) -> Iterator[dict[str, Any]]:
    """count x count layers, forward."""
    a, b = ([features(256, 2048, seed=100 * s + i) for i in range(count)] for s in (1, 2))
    of_features: Contenders = {OURS: lambda: layer_cka(a, b), "H K H": lambda: pairs_by_hkh(a, b)}
    models = (Replay(a), Replay(b))
    data: Any = DataLoader([torch.zeros(256, 1)], batch_size=None)  # type: ignore[arg-type]  # a list will do
    of_models: Contenders = {OURS: lambda: thesean.compare(*models, data)}
    bars = {"H K H": 1.0}
    try:
        from cka import cka_from_features, compute_cka
    except ImportError:
        print("pytorch-cka is not installed: compared with H K H alone", file=sys.stderr)
    else:
        names = [f"layers.{i}" for i in range(count)]
        of_features["pytorch-cka"] = lambda: cka_from_features(a, b)
        of_models["pytorch-cka"] = lambda: compute_cka(*models, data, layers=names, device="cpu", progress=False)
        bars["pytorch-cka"] = 1.0
    yield case(f"{count} x {count} layers, features, n=256 p=2048", of_features, rounds, bars)
    yield case(
        f"{count} x {count} layers, models with hooks, n=256 p=2048",
        of_models,
        rounds,
        {name: bar for name, bar in bars.items() if name in of_models},
    )


def case(name: str, contenders: Contenders, rounds: int, bars: dict[str, float]) -> dict[str, Any]:
    """Times, how many times faster we are than each, and whether the bars hold."""
    times = turns(contenders, rounds)
    faster = {
        other: round(figures["median_ms"] / times[OURS]["median_ms"], 2)
        for other, figures in times.items()
        if other != OURS
    }
    return {
        "name": name,
        "rounds": rounds,
        "times": times,
        "times_faster": faster,
        "bars": bars,
        "holds": {other: faster[other] >= bar for other, bar in bars.items()},
    }


def errors() -> dict[str, dict[str, float]]:
    """Largest error of each contender against float64, by offset of the features."""
    found: dict[str, dict[str, float]] = {}
    for offset in (0.0, 30.0, 300.0):
        a, b = ([features(256, 512, offset, seed=10 * s + i) for i in range(3)] for s in (1, 2))
        wide_a, wide_b = ([x.double() for x in side] for side in (a, b))
        biased = torch.stack([similarity(x, y, "cka") for x, y in product(wide_a, wide_b)]).view(3, 3)
        debiased = torch.stack([similarity(x, y, "cka-debiased") for x, y in product(wide_a, wide_b)]).view(3, 3)
        mine = torch.stack([similarity(x, y, "cka") for x, y in product(a, b)]).view(3, 3)
        row = {
            "thesean, cka": (mine - biased).abs().max().item(),
            "thesean, layers": (layer_cka(a, b) - debiased).abs().max().item(),
            "H K H": (pairs_by_hkh(a, b) - biased).abs().max().item(),
        }
        try:
            from cka import cka_from_features
        except ImportError:
            pass
        else:
            row["pytorch-cka"] = (cka_from_features(a, b) - debiased).abs().max().item()
        found[f"{offset:g}"] = {name: float(f"{value:.2g}") for name, value in row.items()}
    return found


def bench(run: Run) -> None:
    rounds, width, tall, layers = (run.settings[key] for key in ("rounds", "width", "tall", "layers"))
    for row in (*one_pair(rounds, width, tall), *all_layers(rounds, layers)):
        if run.wants(row["name"]):
            run.add(**row)
    run.keep(largest_error_by_offset=errors())


def table(result: Result) -> str:
    """Medians, then errors."""
    lines = ["| case | code | median | times ours | bar |", "|---|---|---:|---:|---:|"]
    for row in result["cases"]:
        for name, figures in row["times"].items():
            bar = row["bars"].get(name)
            verdict = "" if bar is None else f"{bar:g}, {'holds' if row['holds'][name] else 'does not hold'}"
            ratio = "" if name == OURS else f"{row['times_faster'][name]:.2f}"
            lines.append(f"| {row['name']} | {name} | {figures['median_ms']:.2f} ms | {ratio} | {verdict} |")
    wrong = result["details"]["largest_error_by_offset"]
    names = list(next(iter(wrong.values())))
    lines += ["", "Largest error against float64, by the features' offset:", ""]
    lines += [f"| offset | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    lines += [f"| {offset} | {' | '.join(f'{row[n]:.1e}' for n in names)} |" for offset, row in wrong.items()]
    return "\n".join(lines)


CASE = Case(
    question="Is CKA faster than the usual code, and is it right?",
    minutes=2,
    unit="ms",
    run=bench,
    settings={"rounds": 31, "width": 4096, "tall": 2048, "layers": 12},
    quick={"rounds": 2, "width": 512, "tall": 512, "layers": 2},
    table=table,
)
