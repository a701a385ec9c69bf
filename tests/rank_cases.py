"""Small conversions that one process and several do alike: `python -m tests.rank_cases FOLDER WAY NAME...`, where the
way is whole, killed, stopped or resumed.

In double: Adam divides a gradient by its size, so that in single precision a bias whose gradient is 0 but for rounding
(one before a batch norm) would go different ways.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import thesean
import thesean.journal
from tests import models
from tests.distill.tools import stopped_at
from thesean import ranks
from thesean.distill import averaged
from thesean.distill.averaged import Averaged
from thesean.distill.sharded import Sharding
from thesean.errors import RankError, TheseanError
from thesean.journal import Interrupted

LOST = 3  # the exit code of a rank that was told of another's end
INTERRUPTED = "mse, progressive, uneven"
SHARDED = "sharded"
MEANS = "means of steps"
SPREAD = "parts spread"  # in two processes one part and two

Case = tuple[nn.Module, Any, dict[str, Any]]


def guide() -> nn.Module:
    """An MLP whose layers matter."""
    model = models.mlp().double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5 if p.ndim == 2 else 1.0)
    return model


def batches(rows: int = 16, count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels that can be learnt."""
    inputs = [models.vectors(rows, 8, seed=k).double() for k in range(count)]
    return [(x, x[:, :5].argmax(1)) for x in inputs]


def shuffled(seed: int) -> DataLoader:
    """As a sampler of each rank's own would give them."""
    rows = TensorDataset(models.vectors(64, 8).double())
    return DataLoader(rows, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(seed))


def cross_entropy(output: Any, batch: Any) -> torch.Tensor:
    """Over the labels that count, of which each rank has another number."""
    return F.cross_entropy(output, batch[1], ignore_index=0)


def vectors(
    measure: Any = "nmse",
    schedule: str = "joint",
    rows: int = 16,
    loss: Any = None,
    options: Any = None,
    steps: int = 12,
    **align: Any,
) -> Case:
    """An MLP's parts, aligned and then fine-tuned. Narrow, so that there is something to gain; and never solved before
    that, for what is solved is nearer than so few steps lead.
    """
    alignment = {"schedule": schedule, "measure": measure, "learning_rate": 1e-2, "share": 0.5, "check_every": 2}
    tuning = {"learning_rate": 5e-3, "distillation": 0.0 if loss else 1.0}
    recipe = {"steps": steps, "warmup": 1, "closed_form": {"enabled": False}, "fine_tuning": tuning}
    recipe["alignment"] = {"ceiling": 0, **alignment, **align}
    target = thesean.Target("mlp", width=6, **{"hidden_norm": "layer", **(options or {})})
    return guide(), target, {"data": batches(rows), "loss": loss, "recipe": recipe}


def labelled() -> Case:
    """A loss and a metric of Thesean's, some labels of which count for nothing."""
    model, target, given = vectors(loss=thesean.cross_entropy)
    data = [(x, y.where(y != 1, -100)) for x, y in batches(rows=13)]
    return model, target, {**given, "metric": thesean.accuracy, "data": data}


def spread(case: Case, **settings: Any) -> Case:
    """With settings of the recipe that change where it is computed, and not what."""
    model, target, given = case
    return model, target, {**given, "recipe": {**given["recipe"], **settings}}


class Attending(nn.Module):
    """x_BTD + attention, where steps of mask 0 aren't seen."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores_BTT = torch.where(mask[:, None] == 1, query @ key.mT, -torch.inf)
        return x + self.out(scores_BTT.softmax(-1) @ value)


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attending() for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def padded() -> Case:
    """Rows of which each rank hides as many steps as it happens to, and some none."""
    torch.manual_seed(0)
    lengths = [torch.tensor([5, 3, 5, 5, 4, 5]), torch.tensor([5, 5, 5, 2, 4, 5]), torch.full((6,), 5)]
    data = [
        {"x": models.vectors(6, 5, 8, seed=k).double(), "mask": (torch.arange(5) < lengths[k % 3][:, None]).long()}
        for k in range(5)
    ]
    recipe = {"steps": 4, "warmup": 1, "alignment": {"share": 0.5}, "fine_tuning": {"learning_rate": 1e-3}}
    return Sentences().double(), "linear-attention", {"data": data, "recipe": recipe}


class Pooled(Sentences):
    """One number a row."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, mask).mean((1, 2)).unsqueeze(1)


def tried() -> Case:
    """Enough steps, and few outputs: a trial tells what is gone on with."""
    _, target, given = padded()
    return Pooled().double(), target, {**given, "recipe": {"steps": 200, "warmup": 1}}


def whole_examples() -> Case:
    """The same, by what the paper leaves open."""
    model, target, given = padded()
    alignment: dict[str, Any] = {
        "schedule": "progressive",
        "measure": "cka",
        "samples": "examples",
        "normalize_rows": True,
    }
    alignment |= {"share": 0.5, "reduction": "mean", "stage_measures": {2: {"cka": 1.0, "nmse": 1.0}}}
    recipe: dict[str, Any] = {"optimizer": "adam", "learning_rate_schedule": "constant", "alignment": alignment}
    recipe["closed_form"] = {"enabled": False}
    return model, target, {**given, "recipe": {**given["recipe"], **recipe}}


CASES: dict[str, Callable[[], Case]] = {
    "closed form": lambda: (guide(), "mlp", {"data": batches(), "loss": cross_entropy, "recipe": "fast"}),
    "cka, joint": lambda: vectors("cka"),
    "mse, progressive, uneven": lambda: vectors("mse", "progressive", rows=13, loss=cross_entropy),
    "our own loss": labelled,
    "batch norms": lambda: vectors(options={"hidden_norm": "batch"}, steps=24, recalibrate=True),
    "padded": padded,
    "whole examples": whole_examples,
    # two batches a step, whose activations are computed anew, batch norms among them
    "accumulated": lambda: spread(
        vectors(rows=13, steps=8, options={"hidden_norm": "batch"}),
        activation_checkpointing=True,
        gradient_accumulation=2,
    ),
    SPREAD: lambda: spread(
        vectors("nmse", "independent", rows=13, loss=cross_entropy, options={"hidden_norm": "batch"}, reduction="mean"),
        activation_checkpointing=True,
        gradient_accumulation=2,
    ),
    # which of the two goes on is agreed on
    "shares by a trial": tried,
    SHARDED: lambda: spread(vectors("cka", rows=13, loss=cross_entropy), sharded=True),
    # which is of slices
    MEANS: lambda: spread(
        vectors(rows=13, steps=80, loss=cross_entropy), sharded=True, fine_tuning={"learning_rate": 2e-3}
    ),
    "dmnn, joint": lambda: vectors("dmnn", inputs="mixed"),
    "nmse, sequential": lambda: vectors("nmse", "sequential", steps=18, order="easiest-first"),
    "cka, independent": lambda: vectors({"cka": 1.0, "nmse": 0.5}, "independent", rows=13),
    "cka and output, independent": lambda: vectors({"cka": 1.0, "nmse": 0.5}, "independent", output="kl"),
    "stochastic": lambda: vectors(schedule="stochastic", loss=cross_entropy),
}


def result(name: str, **more: Any) -> dict[str, Any]:
    """What a conversion came to: numbers that don't depend on how long it took."""
    model, target, given = CASES[name]()
    with looked_at_means() if name == MEANS else nullcontext():
        converted = thesean.compile(model, target, **{"progress": False, **given, **more})
    report = converted.report
    return {
        "weights": {k: v.detach().clone() for k, v in converted.module.state_dict().items()},
        "losses": [loss for curve in report.curves for loss in curve.losses],
        "held out": [value for curve in report.curves for _, value in curve.held_out],
        "stages": [stage.divergence for stage in report.stages],
        "final": [v for v in report.converted.values() if v is not None],
        "notes": report.notes,
        "sent": ranks.sent(),
    }


@contextmanager
def looked_at_means() -> Iterator[None]:
    """As in a run of many steps; fewer have one here."""
    stand_in = mock.Mock(side_effect=Averaged.standing_in)
    with (
        mock.patch.object(averaged, "_LEAST", 40),
        mock.patch.object(Averaged, "standing_in", lambda self: stand_in(self)),
    ):
        yield
    assert stand_in.called


def keep_every_step() -> None:
    """Checkpoints of runs that are over before it is time for one."""
    thesean.journal._AT_LEAST_S, thesean.journal._SHARE = 0.0, 1e9


# Of the losses below, and no settings of theirs: the run that goes on is given the same loss.
steps = [0]
ends_at = [0]


def deadly(rank: int, at: int) -> Callable[[Any, Any], torch.Tensor]:
    """A loss in which a rank kills itself in the so many-th step; how often networks are judged doesn't count."""
    steps[:], ends_at[:] = [-1], [at]  # it is tried once before anything is solved

    def loss(output: Any, batch: Any) -> torch.Tensor:
        steps[0] += output.requires_grad
        if steps[0] == ends_at[0] > 0 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(output, batch)

    return loss


def stopped(folder: Path, names: list[str]) -> None:
    """Runs that end in their midst: three steps of their first stage are taken."""
    for name in names:
        with suppress(Interrupted), stopped_at(3):
            result(name, workdir=folder / name)


def resumed(folder: Path, names: list[str]) -> None:
    """And go on."""
    found = {name: result(name, workdir=folder / name, resume="must") for name in names}
    torch.save(found, folder / f"found.{os.environ['RANK']}")


def held() -> tuple[int, int]:
    """The most bytes of weights that a rank holds while a step runs whose weights lie in slices, and all of them."""
    most, total, hold = 0, 0, Sharding.hold

    def counting(self: Sharding, tensors: Any) -> None:
        nonlocal most, total
        hold(self, tensors)
        most = max(most, sum(s.weight.untyped_storage().nbytes() for s in self.slices.values()))
        total = sum(s.bytes for s in self.slices.values())

    Sharding.hold = counting  # type: ignore[method-assign]
    try:
        result(SHARDED)
    finally:
        Sharding.hold = hold  # type: ignore[method-assign]
    return most, total


def half(sharded: bool) -> dict[str, torch.Tensor]:
    """In bfloat16, whose masters lie in slices too; nothing is clipped, which sums in another order would round."""
    _, target, given = vectors()
    recipe = {**given["recipe"], "sharded": sharded, "clip": 1e6}
    data = [x.bfloat16() for x, _ in given["data"]]
    converted = thesean.compile(guide().bfloat16(), target, data=data, recipe=recipe, progress=False)
    return converted.module.state_dict()


def refused(**given: Any) -> str:
    """What a conversion that a rank can't take part in says."""
    try:
        thesean.compile(guide(), "mlp", **{"progress": False, "recipe": "fast", "data": batches(), **given})
    except TheseanError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def compared(folder: Path, names: list[str]) -> None:
    """Cases' results, and what is said of ranks that were given different things, and of too few rows."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {name: result(name) for name in names}
    found["other seeds"] = refused(seed=rank)
    found["other order"] = refused(data=shuffled(rank))
    found["one row"] = refused(data=batches(1))
    found["held"] = held()
    found["half"] = [half(sharded) for sharded in (False, True)]
    torch.save(found, folder / f"found.{rank}")
    stopped(folder, [SHARDED, SPREAD])


def killed(folder: Path) -> None:
    """Rank 1 is killed in the midst of a run."""
    keep_every_step()
    try:
        result(INTERRUPTED, loss=deadly(1, 4), workdir=folder / "run")
    except RankError as error:
        print(error, file=sys.stderr)
        sys.exit(LOST)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    ways = {"stopped": stopped, "resumed": resumed, "killed": compared, "whole": compared}
    ways[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:])
    if sys.argv[2] == "killed":
        killed(Path(sys.argv[1]))
