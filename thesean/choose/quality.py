"""What a candidate loses: a short probe of each part alone, and of whole choices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from thesean.choose.candidates import Candidates
from thesean.distill.closed_form import solve_alone, solve_parts
from thesean.distill.evaluate import Evaluation
from thesean.distill.fine_tune import fine_tune
from thesean.distill.objective import examples as rows_of
from thesean.distill.seen import Seen
from thesean.distill.training import Training
from thesean.journal import KEEPS_NOTHING
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.modes import seeded
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import Hybrid, Replacement, build_hybrid
from thesean.similarity import get_measure
from thesean.targets import TargetModule

Inputs = dict[str, torch.Tensor]
State = list[dict[str, torch.Tensor]]  # one a site of the part


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Optimizer steps of a probe: of one part's module on cached activations, and of a whole finalist end to end."""

    part_steps: int = 15
    whole_steps: int = 40


class Prober:
    """Scores candidates by the hybrid's divergence from the guide on held-out batches (nats, or normalised MSE).

    A part's module is initialised as a conversion would (copied, chosen by activations, solved in closed form), fitted
    for a few steps on the guide's own activations, and left in the better of the two states.
    """

    def __init__(self, candidates: Candidates, training: Training, effort: Effort = Effort()) -> None:
        self.candidates, self.effort = candidates, effort
        # the first batches again and again: every candidate is fitted on the same ones
        self.batches = training.feed.take(training.recipe.closed_form.batches)
        self.training = replace(training, feed=replace(training.feed, batches=self.batches), journal=KEEPS_NOTHING)
        self.guide, self.recipe, self.observer = training.guide, training.recipe, training.observer
        self.judge = training.judge
        self.inputs = [inputs for _, inputs in self.batches]
        self._cached: tuple[tuple[str, ...], list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self.states: dict[tuple[int, int], State] = {}

    def part(self, part: int, candidate: int) -> float:
        """The divergence of the guide with this one part replaced; 0 where it is kept."""
        bound_plan = self.candidates.alone(part, candidate)
        if not bound_plan.plan.replaced:
            return 0.0
        path, name = bound_plan.plan.parts[part].path, self.candidates.names[candidate]
        self.observer.begin(f"probe {name}", path, part + 1, len(bound_plan.parts), self.effort.part_steps)
        with seeded(self.training.seed):
            hybrid = build_hybrid(bound_plan)
            for replacement in hybrid.replacements:
                self._fit(hybrid.module(replacement), replacement)
        hybrid.graph_module.eval()
        self.states[part, candidate] = [deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements]
        divergence = self.judge(hybrid.graph_module).divergence
        self.observer.end({"divergence": divergence})
        return divergence

    def whole(self, choice: Sequence[int]) -> Evaluation:
        """All parts of a choice together, with the modules that were fitted alone, tuned end to end for a few steps."""
        bound_plan = self.candidates.bind(choice)
        with seeded(self.training.seed):
            hybrid = build_hybrid(bound_plan)
            self._load(hybrid, bound_plan, choice)
            # part after part on what the ones before it give by now
            parts = range(len(hybrid.parts))
            ridge = self.recipe.closed_form.ridge
            solve_parts(self.guide, hybrid, parts, self.inputs, ridge=ridge, solve_copied=True)
            if self.effort.whole_steps:
                # each finalist begins with the first batch
                fine_tune(
                    hybrid,
                    replace(self.training, feed=replace(self.training.feed)),
                    self.effort.whole_steps,
                    phase="finalist",
                )
        return self.judge(hybrid.graph_module)

    def _load(self, hybrid: Hybrid, bound_plan: BoundPlan, choice: Sequence[int]) -> None:
        replaced = [(p, c) for p, c in enumerate(choice) if bound_plan.parts[p].target is not None]
        for number, key in enumerate(replaced):
            for replacement, state in zip(hybrid.of_part(number), self.states[key], strict=True):
                hybrid.module(replacement).load_state_dict(state)

    def _fit(self, module: nn.Module, replacement: Replacement) -> None:
        """What a conversion would begin with, and a few steps on the guide's own activations: no other part is
        replaced, so they are the hybrid's as well.
        """
        examples = self._examples(replacement)
        ridge, where = self.recipe.closed_form.ridge, replacement.facts.path
        if isinstance(module, TargetModule):
            module.eval()
            with torch.no_grad():
                module.prepare(replacement.facts, examples)
        # copied output projections too: nothing else brings a hybrid as near without many steps
        solve_alone(module, examples, ridge=ridge, where=where)
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters or not self.effort.part_steps:
            return
        before, solved = _mean_loss(module, examples), deepcopy(module.state_dict())
        module.train()
        self.training.trainer.train(
            parameters,
            lambda step, pair: _loss(module, *pair),
            itertools.cycle(examples),
            steps=self.effort.part_steps,
            learning_rate=self.recipe.alignment.learning_rate,
            where=f"probing {where}",
        )
        module.eval()
        solve_alone(module, examples, ridge=ridge, where=where)
        if not _mean_loss(module, examples) < before:
            module.load_state_dict(solved)

    @torch.no_grad()
    def _examples(self, r: Replacement) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The guide's activations at a part's ends without padded steps, of one part at a time."""
        key = (r.guide_entry, r.guide_exit, *(m.node for m in r.masks))
        if self._cached is None or self._cached[0] != key:
            seen = Seen(self.guide)
            ends = intermediates(self.guide, [r.guide_entry, r.guide_exit, *seen.names], with_output=False)
            self._cached = (key, [pair for inputs in self.inputs for pair in seen.examples(r, ends(**inputs))])
        return self._cached[1]


def _loss(module: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    y = module(x)
    return get_measure("nmse").loss(rows_of(y[0] if isinstance(y, tuple) else y), rows_of(wanted))


@torch.no_grad()
def _mean_loss(module: nn.Module, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(_loss(module, x, wanted).item() for x, wanted in examples) / len(examples)
