"""Bring target parts to the guide's activations, stage by stage, by a similarity measure.

Schedules (Network of Theseus, arXiv 2512.04198): progressive (stage k trains parts 1..k), sequential (stage k trains
part k, earlier ones frozen), independent (every part on the guide's own inputs), joint (all at once).

N examples (tokens of a sequence, images of a batch), P features
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.curve import Curve, Tracing
from thesean.distill.best import Best
from thesean.distill.closed_form import solve_parts
from thesean.distill.seen import Seen, rows
from thesean.distill.stopping import Plateau
from thesean.distill.task import Batch
from thesean.distill.training import Training
from thesean.errors import DataError, NumericalError
from thesean.journal import Stateful
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import Hybrid
from thesean.similarity import Measure, get_measure

# CKA's Gram or covariance costs grow with the examples; past this many tokens the estimate gains nothing
_MAX_EXAMPLES = 4096

_FAINT = 1e-8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`number` of `count`; `trained` are the parts whose weights move, `compared` those whose exits are matched."""

    number: int
    count: int
    trained: tuple[int, ...]
    compared: tuple[int, ...]
    steps: int


@dataclass(frozen=True, kw_only=True)
class StageResult:
    stage: Stage
    before: float  # the held-out loss at the stage's last part, after the closed form
    after: float
    steps: int
    stopped_by: str
    curve: Curve
    measure: str

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StageResult:
        return StageResult(**{**data, "stage": Stage(**data["stage"]), "curve": Curve.from_dict(data["curve"])})


def stages(schedule: str, parts: int, steps: int) -> list[Stage]:
    """The stages of a schedule over `parts` parts with `steps` optimizer steps in all."""
    everything = tuple(range(parts))
    if schedule in ("joint", "independent"):
        return [Stage(number=0, count=1, trained=everything, compared=everything, steps=steps)]
    shares = [steps // parts + (k < steps % parts) for k in range(parts)]
    return [
        Stage(
            number=k,
            count=parts,
            trained=everything[: k + 1] if schedule == "progressive" else (k,),
            compared=everything[: k + 1] if schedule == "progressive" else (k,),
            steps=shares[k],
        )
        for k in range(parts)
    ]


class Aligner:
    """Runs stages on one hybrid. Some held-out batches decide when a stage ends; `solving` feed the closed form."""

    def __init__(self, hybrid: Hybrid, training: Training, solving: Sequence[dict[str, torch.Tensor]]) -> None:
        self.hybrid, self.training, self.solving = hybrid, training, solving
        self.guide, self.recipe, self.observer = training.guide, training.recipe, training.observer
        self.held_out = [training.judge.batches[number] for number in training.judge.sample]
        self.seen = Seen(self.guide)
        self.measure: Measure = get_measure(self.recipe.alignment.measure)
        self.own_inputs = self.recipe.alignment.schedule != "independent"

    def run(self, stage: Stage) -> StageResult:
        """Train a stage, refit, and leave the hybrid in the best refitted state that was seen."""
        settings = self.recipe.alignment
        last = stage.compared[-1]
        where = self.hybrid.parts[last] if stage.count > 1 else f"{len(stage.trained)} parts"
        self.observer.begin("align", where, stage.number + 1, stage.count, stage.steps)
        graph_module = self.hybrid.graph_module
        previous = [p.requires_grad for p in graph_module.parameters()]
        graph_module.requires_grad_(False)
        parameters = self.hybrid.parameters_of(stage.trained)
        for p in parameters:
            p.requires_grad_(True)
        before = self.held_out_loss(last)
        watch = _Watch(self, stage, where, before)
        steps = 0
        if stage.steps and not watch.plateau.done and parameters:
            graph_module.train()
            steps = self.training.trainer.train(
                parameters,
                self._loss(stage),
                self.training.feed.stream,
                steps=stage.steps,
                learning_rate=settings.learning_rate,
                where=f"aligning {where}",
                after=watch,
            )
        best = watch.best
        best.restore()
        for p, flag in zip(graph_module.parameters(), previous, strict=True):
            p.requires_grad_(flag)
        graph_module.eval()
        result = StageResult(
            stage=stage,
            before=before,
            after=best.value,
            steps=steps,
            stopped_by=watch.plateau.reason if parameters else "nothing to train",
            curve=watch.trace.done(best.step),
            measure=settings.measure,
        )
        self.observer.end({self.measure.name: best.value})
        return result

    def refit(self, stage: Stage) -> None:
        parts = range(stage.compared[-1] + 1) if self.recipe.alignment.refit_all else stage.trained
        form = self.recipe.closed_form
        solve_parts(
            self.guide, self.hybrid, list(parts), self.solving, ridge=form.ridge, solve_copied=form.solve_copied
        )

    @torch.no_grad()
    def held_out_loss(self, part: int) -> float:
        """The measure's loss at the exit of `part`, hybrid against guide, over the held-out batches."""
        own, theirs = self._ends((part,))
        own.eval()
        exit_own, exit_guide = self.hybrid.boundaries[part]
        total = 0.0
        for _, inputs in self.held_out:
            wanted = theirs(**inputs)
            mask_BT = self.seen.of(exit_guide, wanted)
            y, g = rows(own(**inputs)[exit_own], mask_BT), rows(wanted[exit_guide], mask_BT)
            total += self._compare(part, y, g).item()
        return total / len(self.held_out)

    def _compare(self, part: int, y: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """The measure's loss, 0 where the guide's activations are `faint`; what is wrong with them is told of the part
        that they belong to.
        """
        if faint(guide):
            logger.warning("%s: the guide's activations hardly vary there, nothing is aligned", self.hybrid.parts[part])
            return 0.0 * y.sum()
        try:
            return self.measure.loss(examples(y), examples(guide))
        except (DataError, NumericalError) as error:
            raise type(error)(f"{self.hybrid.parts[part]}: {error}") from error

    def _ends(self, parts: Sequence[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
        own = intermediates(self.hybrid.graph_module, [self.hybrid.boundaries[k][0] for k in parts], with_output=False)
        exits = [self.hybrid.boundaries[k][1] for k in parts]
        theirs = intermediates(self.guide, [*exits, *self.seen.names], with_output=False)
        return own, theirs

    def _loss(self, stage: Stage) -> Any:
        return self._own_inputs_loss(stage) if self.own_inputs else self._independent_loss()

    def _own_inputs_loss(self, stage: Stage) -> Any:
        """Sum over the compared parts of the measure at their exits, on the hybrid's own activations."""
        own, theirs = self._ends(stage.compared)
        names = [self.hybrid.boundaries[k] for k in stage.compared]

        def loss(step: int, batch: Batch) -> torch.Tensor:
            inputs = batch[1]
            with torch.no_grad():
                wanted = theirs(**inputs)
            got = own(**inputs)
            terms = []
            for k, (y, g) in zip(stage.compared, names, strict=True):
                mask_BT = self.seen.of(g, wanted)
                terms.append(self._compare(k, rows(got[y], mask_BT), rows(wanted[g], mask_BT)))
            return torch.stack(terms).sum()

        return loss

    def _independent_loss(self) -> Any:
        """Sum over modules of the measure at their own output, each fed the guide's activations."""
        # a part that was only dropped has nothing to train
        replacements = [r for r in self.hybrid.replacements if any(True for _ in self.hybrid.module(r).parameters())]
        names = [n for r in replacements for n in (r.guide_entry, r.guide_exit)]
        theirs = intermediates(self.guide, [*names, *self.seen.names], with_output=False)

        def loss(step: int, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                values = theirs(**batch[1])
            terms = []
            for r in replacements:
                read, mask_BT = self.seen.read_by(r, values), self.seen.of(r.guide_exit, values)
                y = self.hybrid.module(r)(values[r.guide_entry], **({} if read is None else {"mask": read}))
                y = y[0] if isinstance(y, tuple) else y
                terms.append(self._compare(r.part, rows(y, mask_BT), rows(values[r.guide_exit], mask_BT)))
            return torch.stack(terms).sum()

        return loss


class _Watch:
    """Now and then refits a stage's parts and measures them, and says when the stage is over."""

    def __init__(self, aligner: Aligner, stage: Stage, where: str, before: float) -> None:
        settings = aligner.recipe.alignment
        self.aligner, self.stage, self.settings = aligner, stage, settings
        self.modules = [aligner.hybrid.module(r) for r in aligner.hybrid.replacements]
        self.trace = Tracing("align", where, settings.learning_rate, held_out=[(0, before)])
        self.best = Best(self.modules)
        self.best.offer(before)
        self.plateau = Plateau(settings.patience, settings.min_improvement, settings.ceiling)
        self.plateau.update(before)

    def __call__(self, step: int, loss: float) -> bool:
        self.trace.losses.append(loss)
        if step % self.settings.check_every and step != self.stage.steps:
            return False
        training = [deepcopy(m.state_dict()) for m in self.modules]
        if self.settings.refit:
            self.aligner.refit(self.stage)
        value = self.aligner.held_out_loss(self.stage.compared[-1])
        self.best.offer(value, step)
        self.trace.held_out.append((step, value))
        self.plateau.update(value)
        for module, state in zip(self.modules, training, strict=True):
            module.load_state_dict(state)
        return self.plateau.done

    @property
    def _parts(self) -> tuple[Stateful, ...]:
        return (self.trace, self.best, self.plateau, *self.modules)

    def state_dict(self) -> list[Any]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[Any]) -> None:
        for part, own in zip(self._parts, state, strict=True):
            part.load_state_dict(own)


def faint(guide: torch.Tensor) -> bool:
    """Whether activations vary, but so little that one step of a weight moves them by many times as much.

    Deep guides with random weights are like that, each layer 1e-3 of the one before.
    """
    return 0 < float(examples(guide).std(0).amax()) < _FAINT


def examples(value: torch.Tensor) -> torch.Tensor:
    """(N, P): every token of a sequence is an example, every image or vector of a batch otherwise."""
    flat = value.flatten(0, 1) if value.ndim == 3 else value.flatten(1)  # tokens that were picked are (N, P) already
    if flat.shape[0] > _MAX_EXAMPLES:
        flat = flat[:: -(-flat.shape[0] // _MAX_EXAMPLES)]
    return flat
