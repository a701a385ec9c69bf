"""What a candidate loses: a short probe of each part alone, and of whole choices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from thesean.choose.activations import Activations, JudgedTail
from thesean.choose.candidates import Candidates, Choice
from thesean.distill.closed_form import prepares, solve_alone, solve_parts
from thesean.distill.evaluate import Evaluation
from thesean.distill.fine_tune import fine_tune
from thesean.distill.seen import examples as rows_of
from thesean.distill.training import Training
from thesean.journal import KEEPS_NOTHING
from thesean.passes.analyse.cost import SymbolicSizes
from thesean.passes.graph.modes import seeded
from thesean.passes.graph.shelf import Shelf
from thesean.passes.plan.hybrid import Hybrid, Replacement, build_hybrid
from thesean.similarity import get_measure
from thesean.targets import TargetModule

Inputs = dict[str, torch.Tensor]
State = list[dict[str, torch.Tensor]]  # one a site


# A candidate this many times as far from the guide as one that costs no more is not worth gradient steps
HOPELESS = 3.0

# Nor is a finalist that is so many times as far as the first, once its parts are solved on one another
_BEHIND = 1.5

# What probes are fitted on: rows of activations, and batches where those are large
_ROWS, _ROWS_A_CHANNEL, _LEAST_BATCHES = 8192, 16, 4

# What they are judged on: batches of those that are held out, from all over them
_JUDGED = 2


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Optimizer steps of a probe: of one part's module on cached activations, and of a whole finalist end to end; and
    how many finalists are worth those. With fewer steps those win that are near at the start, and not at the end: on
    the demo's model 25 put four halved attentions first, 40 a convolution and two of them.
    """

    part_steps: int = 15
    whole_steps: int = 40
    tuned: int = 3


class Prober:
    """Scores candidates by the hybrid's divergence from the guide on held-out batches (nats, or normalised MSE).

    A part's module is initialised as a conversion would (copied, chosen by activations, solved in closed form), fitted
    for a few steps on the guide's own activations, and left in the better of the two states. Whatever was found is
    found once, for however many budgets. Use as a context manager.
    """

    def __init__(self, candidates: Candidates, training: Training, effort: Effort = Effort()) -> None:
        self.candidates, self.effort = candidates, effort
        # the first batches again and again: every candidate is fitted on the same ones
        self.batches = training.feed.take(training.recipe.closed_form.least)
        self.training = replace(training, feed=replace(training.feed, batches=self.batches), journal=KEEPS_NOTHING)
        self.guide, self.recipe, self.observer = training.guide, training.recipe, training.observer
        self.judge = training.judge
        self.inputs = self._enough([inputs for _, inputs in self.batches])
        sample = self.judge.sample
        few = sample if len(sample) <= _JUDGED else sample[:: len(sample) - 1]
        self._sample = {number: at for at, number in enumerate(few)}  # number of a batch -> which of them
        self._shelf = Shelf()
        judged = [self.judge.batches[number][1] for number in self._sample]
        self._activations = Activations(candidates, self.inputs, judged, self._shelf)
        self.states: dict[tuple[int, int], State] = {}
        self._scores: dict[tuple[int, int], float] = {}
        self._solved: dict[Choice, tuple[Evaluation, State]] = {}
        self._tuned: dict[Choice, Evaluation] = {}

    def __enter__(self) -> Prober:
        self._shelf.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._shelf.__exit__(*error)

    def part(self, part: int, candidate: int, hopeless_from: float = math.inf) -> float:
        """The divergence of the guide with this one part replaced, 0 where it is kept. One that is at `hopeless_from`
        or beyond in closed form is left there.
        """
        if (part, candidate) in self._scores:
            return self._scores[part, candidate]
        bound_plan = self.candidates.alone(part, candidate)
        if not bound_plan.plan.replaced:
            return 0.0
        path, name = bound_plan.plan.parts[part].path, self.candidates.names[candidate]
        self.observer.begin(f"probe {name}", path, part + 1, len(bound_plan.parts), self.effort.part_steps)
        with seeded(self.training.seed):
            hybrid = build_hybrid(bound_plan, share=True)  # all but the part's modules stays as it is
            hybrid.graph_module.eval()
            tail = self._activations.tail(part, hybrid.graph_module)
            for replacement in hybrid.replacements:
                self._start(hybrid.module(replacement), part, replacement)
            # one batch tells multiples apart
            if math.isinf(hopeless_from) or self._judged(tail, list(self._sample)[:1]) < hopeless_from:
                for r in hybrid.replacements:
                    self._improve(hybrid.module(r), part, r)
            divergence = self._judged(tail, list(self._sample))
        self.states[part, candidate] = _states(hybrid)
        self.observer.end({"divergence": divergence})
        self._scores[part, candidate] = divergence
        return divergence

    def race(self, choices: Sequence[Choice]) -> dict[Choice, Evaluation]:
        """All parts of each choice together: solved part after part, and the few that are not hopeless by then tuned
        end to end for a few steps. What is left out here was seen to be worse.
        """
        solved = {choice: self.solved(choice) for choice in choices}
        ranked = sorted(choices, key=lambda choice: solved[choice].divergence)
        first = solved[ranked[0]].divergence
        left = [c for c in ranked if solved[c].divergence <= _BEHIND * first][: self.effort.tuned]
        if len(left) == 1:
            return {left[0]: solved[left[0]]}
        return {choice: self._tune(choice) for choice in left}

    def solved(self, choice: Choice) -> Evaluation:
        """All parts of a choice together, with the modules that were fitted alone: solved part after part on what the
        ones before give by now.
        """
        if choice not in self._solved:
            with seeded(self.training.seed):
                hybrid = build_hybrid(self.candidates.bind(choice), share=True)
                self._load(hybrid, choice)
                parts = range(len(hybrid.parts))
                ridge = self.recipe.closed_form.ridge
                solve_parts(self.guide, hybrid, parts, self.inputs, ridge=ridge, solve_copied=True)
            self._solved[choice] = (self.judge(hybrid.graph_module), _states(hybrid))
        return self._solved[choice][0]

    def _tune(self, choice: Choice) -> Evaluation:
        if choice not in self._tuned:
            bound_plan = self.candidates.bind(choice)
            if not bound_plan.plan.replaced or not self.effort.whole_steps:
                return self.solved(choice)
            with seeded(self.training.seed):
                hybrid = build_hybrid(bound_plan)
                for replacement, state in zip(hybrid.replacements, self._solved[choice][1], strict=True):
                    hybrid.module(replacement).load_state_dict(state)
                # each finalist begins with the first batch
                fine_tune(hybrid, self._brief(), self.effort.whole_steps, phase="finalist")
            self._tuned[choice] = self.judge(hybrid.graph_module)
        return self._tuned[choice]

    def _brief(self) -> Training:
        """For a few steps, which would take less time than looking at all of what is held out."""
        held_out = [self.judge.batches[number] for number in list(self._sample)[:1]]
        return replace(self.training, feed=replace(self.training.feed, held_out=held_out))

    def _load(self, hybrid: Hybrid, choice: Choice) -> None:
        options = self.candidates.options
        replaced = [(p, c) for p, c in enumerate(choice) if (o := options[p][c]) is not None and o.target is not None]
        for number, key in enumerate(replaced):
            for replacement, state in zip(hybrid.of_part(number), self.states[key], strict=True):
                hybrid.module(replacement).load_state_dict(state)

    def _judged(self, tail: JudgedTail, numbers: Sequence[int]) -> float:
        return self.judge.of(lambda number: tail.output(self._sample[number]), numbers).divergence

    def _enough(self, batches: list[Inputs]) -> list[Inputs]:
        """As many of them as it takes: solving costs by the row, and all candidates have the same ones."""
        part = self.candidates.kept[0].planned
        shape = part.output_shape
        channels = 1 if part.mixing == "spatial" and len(shape) > 2 else len(shape) - 1
        rows = 0
        for number, inputs in enumerate(batches):
            sizes = SymbolicSizes(self.candidates.binder.captured.signature.check(inputs))
            dims = [sizes[d] if isinstance(d, str) else d for d in shape]
            wanted = max(_ROWS, _ROWS_A_CHANNEL * dims[channels])
            if rows >= wanted and number >= _LEAST_BATCHES:
                return batches[:number]
            rows += math.prod(d for axis, d in enumerate(dims) if axis != channels)
        return batches

    def _start(self, module: nn.Module, part: int, replacement: Replacement) -> None:
        """What a conversion would begin with. No other part is replaced, so the guide's own activations are the
        hybrid's as well.
        """
        if not isinstance(module, TargetModule) or not (prepares(module) or hasattr(module, "last")):
            return
        examples = self._activations.examples(part, replacement)
        with torch.no_grad():
            module.prepare(replacement.facts, examples)
        # copied output projections too: nothing else brings a hybrid as near without many steps
        solve_alone(module, examples, ridge=self.recipe.closed_form.ridge, where=replacement.facts.path)

    def _improve(self, module: nn.Module, part: int, replacement: Replacement) -> None:
        """A few steps on the same activations, where they help."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters or not self.effort.part_steps:
            return
        least, found = get_measure("nmse").min_examples, self._activations.examples(part, replacement)
        examples = [pair for pair in found if rows_of(pair[1]).shape[0] >= least]
        if not examples:
            return
        ridge, where = self.recipe.closed_form.ridge, replacement.facts.path
        before, solved = _mean_loss(module, examples), deepcopy(module.state_dict())
        module.train()
        replace(self.training.trainer, accumulate=1).train(  # examples are of a part, and of as many rows each
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


def _states(hybrid: Hybrid) -> State:
    return [deepcopy(hybrid.module(r).state_dict()) for r in hybrid.replacements]


def _loss(module: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    y = module(x)
    return get_measure("nmse").loss(rows_of(y[0] if isinstance(y, tuple) else y), rows_of(wanted))


@torch.no_grad()
def _mean_loss(module: nn.Module, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(_loss(module, x, wanted).item() for x, wanted in examples) / len(examples)
