"""Bring target parts to the guide's activations, stage by stage, by a similarity measure.

Schedules (Network of Theseus, arXiv 2512.04198): progressive (stage k trains parts 1..k), sequential (stage k trains
part k, earlier ones frozen), independent (every part on the guide's own inputs), joint (all at once); and stochastic
(BERT-of-Theseus, arXiv 2002.02925: all at once, and which parts stand in the network is drawn each step).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from thesean import ranks
from thesean.curve import Curve, Tracing
from thesean.distill.best import Best
from thesean.distill.closed_form import solve_parts
from thesean.distill.objective import Objective, measures_of_stage
from thesean.distill.recalibrate import batch_norms, recalibrate
from thesean.distill.recompute import Recomputing
from thesean.distill.seen import Seen
from thesean.distill.sharded import sharding, whole
from thesean.distill.spread import Spread, spread
from thesean.distill.stopping import Plateau
from thesean.distill.swapping import Swapping, frozen, probability
from thesean.distill.task import Batch
from thesean.distill.training import Training
from thesean.journal import Stateful
from thesean.passes.graph.intermediates import intermediates, names_of
from thesean.passes.graph.modes import evaluating
from thesean.passes.plan.hybrid import Hybrid, Replacement

LossOf = Callable[[int, Batch], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`number` of `count`; `trained` are the parts whose weights move, `compared` those whose exits are matched, the
    newest one last. `replaced` are all that stand by then in the order in which they came; left out, the first ones.
    """

    number: int
    count: int
    trained: tuple[int, ...]
    compared: tuple[int, ...]
    steps: int
    replaced: tuple[int, ...] = ()

    @property
    def standing(self) -> list[int]:
        """In the network's order."""
        return sorted(self.replaced or range(self.compared[-1] + 1))


@dataclass(frozen=True, kw_only=True)
class StageResult:
    stage: Stage
    before: float  # the held-out loss at the stage's last part, or of the whole, after the closed form
    after: float
    steps: int
    stopped_by: str
    curve: Curve
    measure: str
    notes: tuple[str, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StageResult:
        return StageResult(
            **{
                **data,
                "stage": Stage(**data["stage"]),
                "curve": Curve.from_dict(data["curve"]),
                "notes": tuple(data["notes"]),
            }
        )


def stages(schedule: str, parts: int, steps: int) -> list[Stage]:
    """The stages of a schedule over `parts` parts with `steps` optimizer steps in all."""
    everything = tuple(range(parts))
    if schedule in ("joint", "independent", "stochastic"):
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
        # those of most rows first: of a batch that is too small for a measure, others tell that they aren't
        numbers = sorted(training.judge.sample, key=lambda number: -training.judge.rows[number])
        self.held_out = [training.judge.batches[number] for number in numbers]
        self.seen = Seen(self.guide)
        self.objective = Objective(training, hybrid.parts)
        self.recomputing = Recomputing(self.recipe)
        self.spread = spread(hybrid, training)
        self.refits = self.recipe.alignment.refits

    def run(self, stage: Stage) -> StageResult:
        """Train a stage, and leave the hybrid in the best settled state that was seen."""
        settings, newest = self.recipe.alignment, self.hybrid.parts[stage.compared[-1]]
        measures = measures_of_stage(settings, newest, stage.number + 1)
        self.objective = Objective(self.training, self.hybrid.parts, measures)
        where = newest if stage.count > 1 else f"{len(stage.trained)} parts"
        self.observer.begin("align", where, stage.number + 1, stage.count, stage.steps)
        graph_module = self.hybrid.graph_module
        parameters = self.hybrid.parameters_of(stage.trained)
        # not the guide's either, which a hybrid may hold parts of
        with frozen(self.guide), frozen(graph_module):
            for p in parameters:
                p.requires_grad_(True)
            before = self.value(stage)
            watch = _Watch(self, stage, where, before)
            steps = 0
            if stage.steps and not watch.plateau.done and parameters:
                graph_module.train()
                trainer = self.training.trainer
                if self.spread is not None:
                    trainer = replace(trainer, masters=self.spread.masters)
                with sharding([self.guide, graph_module], self.recipe.sharded):
                    steps = trainer.train(
                        parameters,
                        self._loss(stage),
                        self.training.feed.stream,
                        steps=stage.steps,
                        learning_rate=settings.learning_rate,
                        where=f"aligning {where}",
                        after=watch,
                    )
                if self.spread is None and watch.trace.held_out[-1][0] < steps:  # the time was up
                    watch.check(steps)
            best = watch.best
            best.restore()
        graph_module.eval()
        notes = []
        if self.normed(stage) and steps:
            done = f"recalibrated over {len(self.solving)} batches" if best.step else "as they were did best: kept"
            notes.append(f"{where}: batch norms {done}")
        if ranks.any_of(self.objective.skipped):
            notes.append(f"{where}: batches of fewer than {self.objective.least} examples were not compared")
        if self.recomputing.told:
            notes.append(f"{where}: {self.recomputing.told}")
        result = StageResult(
            stage=stage,
            before=before,
            after=best.value,
            steps=steps,
            stopped_by=watch.plateau.reason if parameters else "nothing to train",
            curve=watch.trace.done(best.step),
            measure=self.objective.name,
            notes=tuple(notes),
        )
        self.observer.end({self.objective.name: best.value})
        return result

    def settle(self, stage: Stage) -> None:
        """What follows from weights and data alone: statistics of batch norms, and last layers."""
        parts = stage.standing if self.recipe.alignment.refit_all else sorted(stage.trained)
        normed = self.normed(stage)
        for k in stage.standing if normed else []:  # each reads what the ones before make of it by then
            if k in normed:
                recalibrate(self.hybrid, k, self.solving)
            if self.refits and k in parts:
                self._solve([k])
        if self.refits and not normed:
            self._solve(parts)

    def normed(self, stage: Stage) -> list[int]:
        """Parts whose batch norms are recalibrated."""
        wanted = self.recipe.alignment.recalibrate
        return [k for k in stage.standing if wanted and batch_norms(self.hybrid, k)]

    def _solve(self, parts: Sequence[int]) -> None:
        form = self.recipe.closed_form
        solve_parts(self.guide, self.hybrid, parts, self.solving, ridge=form.ridge, solve_copied=form.solve_copied)

    def value(self, stage: Stage) -> float:
        """What a stage is judged by, lower is better: at its last part, or where no exit is compared of the whole."""
        if self.objective.exits:
            return self.held_out_loss(stage.compared[-1])
        return self.training.judge.value(self.hybrid.graph_module, self.training.judge.sample)

    @torch.no_grad()
    def held_out_loss(self, part: int) -> float:
        """The objective at the exit of `part`, hybrid against guide, and at the output, over the held-out batches."""
        own, theirs = self._ends((part,))
        total = 0.0
        with evaluating(own):
            for whole, inputs in self.held_out:
                wanted, got = theirs(**inputs), own(**inputs)
                terms = (self._at_exit(part, got, wanted), *self._at_output(got, wanted, whole))
                total += sum(term.item() for term in terms)
        return ranks.agreed(total / len(self.held_out))[0]

    def _ends(self, parts: Sequence[int], more: Sequence[str] = ()) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Hybrid and guide up to the exits of parts, or to the output; the guide's has `more` nodes."""
        whole = self.objective.whole
        own = intermediates(self.hybrid.graph_module, [self.hybrid.boundaries[k][0] for k in parts], with_output=whole)
        exits = [self.hybrid.boundaries[k][1] for k in parts]
        theirs = intermediates(self.guide, [*exits, *more, *self.seen.names], with_output=whole)
        return own, theirs

    def _loss(self, stage: Stage) -> LossOf:
        """Over the compared parts the objective at their exits, on the hybrid's own activations, or at their modules'
        outputs, each fed the guide's; and at the output.
        """
        if not self.objective.exits:
            return self._swapping_loss(stage)
        if self.spread is not None:
            return self._spread_loss(stage, self.spread)
        reads = self.recipe.alignment.reads
        exits = stage.compared if reads != "guide" else ()
        alone = self._by_themselves(stage) if reads != "hybrid" else []
        runs = bool(exits) or self.objective.whole
        own, theirs = self._ends(exits, [name for r, _ in alone for name in (r.guide_entry, r.guide_exit)])
        ends = self.hybrid.boundaries
        run_own = self.recomputing.graph(own, [name for name, _ in ends]) if runs else own
        run_theirs = self.recomputing.frozen(theirs, [name for _, name in ends])
        run_theirs = self.training.guided(run_theirs, names_of(theirs))

        def loss(step: int, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                wanted = run_theirs(**batch[1])
            got = run_own(**batch[1]) if runs else {}
            terms = [self._at_exit(k, got, wanted) for k in exits]
            terms += [self._alone(r, module, wanted) for r, module in alone]
            terms = self.objective.over_parts(terms, len(stage.compared))
            if reads == "mixed":
                terms = [term / 2 for term in terms]
            return torch.stack([*terms, *self._at_output(got, wanted, batch[0])]).sum()

        return loss

    def _by_themselves(self, stage: Stage) -> list[tuple[Replacement, Callable[..., Any]]]:
        """Modules that can be run on the guide's activations, one by one."""
        compared = [r for r in self.hybrid.replacements if r.part in stage.compared and self.hybrid.has_weights(r)]
        return [(r, self.recomputing.module(self.hybrid.module(r))) for r in compared]

    def _spread_loss(self, stage: Stage, spread: Spread) -> LossOf:
        """The objective at the outputs of all ranks' parts, each fed the guide's activations of all rows."""
        alone = self._by_themselves(stage)
        replacements = [r for r, _ in alone]
        _, made = self._ends((), [name for r in replacements for name in (r.guide_entry, r.guide_exit)])
        theirs = self.training.guided(made, names_of(made))

        def loss(step: int, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                wanted = spread.received(theirs(**batch[1]), replacements, self.seen.names)

            def terms() -> list[torch.Tensor]:
                own = [self._alone(r, module, wanted) for r, module in alone if spread.has(r.part)]
                return self.objective.over_parts(own, len(stage.compared))

            return spread.total(step, terms)

        return loss

    def _swapping_loss(self, stage: Stage) -> LossOf:
        """The objective at the output of a network in which some of the parts stand, others each step."""
        settings, swapping = self.recipe.alignment, Swapping(self.guide, self.hybrid, self.recomputing)
        names = [] if self.objective.output is None else self.seen.names
        made = intermediates(self.guide, names, with_output=self.objective.output is not None)
        theirs = self.training.guided(made, names_of(made))

        def loss(step: int, batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                wanted = theirs(**batch[1])
            chance = probability(step, stage.steps, settings.swap_from, settings.swap_all_at)
            output = swapping.output(swapping.drawn(chance), batch[1])
            return torch.stack(self._at_output({"output": output}, wanted, batch[0])).sum()

        return loss

    def _at_exit(self, part: int, got: Mapping[str, Any], wanted: Mapping[str, Any]) -> torch.Tensor:
        own, guide = self.hybrid.boundaries[part]
        mask_BT = self.seen.of(guide, wanted)
        return self.objective.at_exit(part, got[own], wanted[guide], mask_BT)

    def _at_output(self, got: Mapping[str, Any], wanted: Mapping[str, Any], batch: Any) -> list[torch.Tensor]:
        if not self.objective.whole:
            return []
        masks = self.seen.of_outputs(wanted) if self.objective.output is not None else {}
        return self.objective.at_output(got["output"], wanted.get("output"), masks, batch)

    def _alone(self, r: Replacement, module: Callable[..., Any], values: Mapping[str, Any]) -> torch.Tensor:
        """The objective at the output of one module that reads the guide's activations."""
        read, mask_BT = self.seen.read_by(r, values), self.seen.of(r.guide_exit, values)
        y = module(values[r.guide_entry], **({} if read is None else {"mask": read}))
        y = y[0] if isinstance(y, tuple) else y
        return self.objective.at_exit(r.part, y, values[r.guide_exit], mask_BT)


class _Watch:
    """Now and then settles a stage's parts and measures them, and says when the stage is over."""

    def __init__(self, aligner: Aligner, stage: Stage, where: str, before: float) -> None:
        settings = aligner.recipe.alignment
        self.aligner, self.stage = aligner, stage
        # to settle reads all batches that are solved on: not more often than in as many steps, where they are many
        many = len(aligner.solving) if aligner.refits or aligner.normed(stage) else 0
        self.every = max(settings.check_every, many if many > aligner.recipe.closed_form.least else 0)
        self.modules = [aligner.hybrid.module(r) for r in aligner.hybrid.replacements]
        self.trace = Tracing("align", where, settings.learning_rate, held_out=[(0, before)])
        self.best = Best(self.modules)
        self.best.offer(before)
        self.plateau = Plateau(settings.patience, settings.min_improvement, settings.ceiling)
        if not aligner.objective.exits:  # before all parts are swapped in a plateau says nothing
            self.plateau = Plateau(sys.maxsize, 0.0, float("-inf"))
        self.plateau.update(before)

    def __call__(self, step: int, loss: float) -> bool:
        self.trace.losses.append(loss)
        if step % self.every and step != self.stage.steps:
            return False
        self.check(step)
        return self.plateau.done

    def check(self, step: int) -> None:
        """Settles, measures, and goes back to the state that is trained."""
        with whole():
            if self.aligner.spread is not None:
                self.aligner.spread.hand_out()
            training = [deepcopy(m.state_dict()) for m in self.modules]
            self.aligner.settle(self.stage)
            value = self.aligner.value(self.stage)
            self.best.offer(value, step)
            for module, state in zip(self.modules, training, strict=True):
                module.load_state_dict(state)
        self.trace.held_out.append((step, value))
        self.plateau.update(value)

    @property
    def _parts(self) -> tuple[Stateful, ...]:
        return (self.trace, self.best, self.plateau, *self.modules)

    def state_dict(self) -> list[Any]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[Any]) -> None:
        for part, own in zip(self._parts, state, strict=True):
            part.load_state_dict(own)
