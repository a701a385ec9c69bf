"""What a stage minimises.

loss = sum_k w_k sum_m w_m m(exit of part k) + w_o D(guide's output, output) + w_t task(output)

over the parts k that a stage compares, or their mean; the output is that of the network in which the parts so far are
replaced.

B batch, T time, N samples (tokens of a sequence or sequences, images of a batch), P features
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from thesean.distill.seen import sampled
from thesean.distill.task import task_loss
from thesean.distill.training import Training
from thesean.errors import DataError, NumericalError
from thesean.kernels.shared.precision import wide
from thesean.passes.plan.partition import matches
from thesean.recipe import Alignment, Recipe, weights_of
from thesean.similarity import get_measure

_FAINT = 1e-8

logger = logging.getLogger(__name__)


class Objective:
    """Of the recipe's alignment, over parts of these paths; by `measures` in place of the recipe's own, where a stage
    has others. A stochastic stage compares no exits: where nothing else is asked for it minimises the user's loss, or
    without one the outputs' divergence.
    """

    def __init__(self, training: Training, parts: Sequence[str], measures: Mapping[str, float] | None = None) -> None:
        settings = training.recipe.alignment
        self.task, self.parts, self.gathered = training.task, parts, training.gathered
        self.exits = settings.schedule != "stochastic"
        self.output, self.output_weight, self.task_weight = settings.output, settings.output_weight, settings.task
        if not self.exits and self.output is None and not self.task_weight:
            self.task_weight = 1.0 if self.task.loss is not None else 0.0
            self.output = "kl" if self.task.loss is None else None
        self.measures = [(weight, get_measure(name)) for name, weight in (measures or settings.measures).items()]
        self.samples, self.normalize = settings.samples, settings.normalize_rows
        self.mean = settings.reduction == "mean"
        self.weights = [_weight(part, settings.weights) for part in parts]
        self.least = max((measure.min_examples for _, measure in self.measures), default=1)
        self.compared = self.skipped = False

    @property
    def whole(self) -> bool:
        """Whether it looks at the network's output."""
        return self.output is not None or self.task_weight > 0

    @property
    def name(self) -> str:
        """For people: "nmse + 0.5 cka + output kl"."""
        terms = [(weight, measure.name) for weight, measure in self.measures] if self.exits else []
        terms += [(self.output_weight, f"output {self.output}")] if self.output is not None else []
        terms += [(self.task_weight, "loss")] if self.task_weight else []
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for weight, name in terms)

    def at_exit(
        self, part: int, y: torch.Tensor, guide: torch.Tensor, mask_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """0 where the guide's activations are `faint`, and of a batch with too few samples, such as what a DataLoader
        has left at the end, once another one had enough; what is wrong with them is told of the part that they are of.
        """
        theirs = sampled(guide, mask_BT, self.samples)
        if theirs.shape[0] < self.least and self.compared:
            self.skipped = True
            return 0.0 * y.sum()
        if faint(theirs):
            logger.warning("%s: the guide's activations hardly vary there, nothing is aligned", self.parts[part])
            return 0.0 * y.sum()
        own = sampled(y, mask_BT, self.samples)
        if self.normalize:
            own, theirs = normalize(wide(own)), normalize(wide(theirs))
        try:
            losses = [(weight * self.weights[part], measure.loss(own, theirs)) for weight, measure in self.measures]
        except (DataError, NumericalError) as error:
            raise type(error)(f"{self.parts[part]}: {error}") from error
        self.compared = True
        return _summed([loss if weight == 1 else weight * loss for weight, loss in losses])

    def over_parts(self, terms: Sequence[torch.Tensor], compared: int) -> list[torch.Tensor]:
        """What is summed, of the terms at the exits of so many parts."""
        return [term / compared for term in terms] if self.mean else list(terms)

    def at_output(self, output: Any, guide: Any, masks: Mapping[str, torch.Tensor], batch: Any) -> list[torch.Tensor]:
        """The companions' terms; `guide` is only read for a divergence."""
        terms = []
        if self.output is not None:
            own, theirs, masks = self.gathered.outputs(self.task.outputs, output, guide, masks)
            terms.append(self.output_weight * self.task.outputs.distance(own, theirs, masks=masks, by=self.output))
        if self.task_weight:
            output = self.gathered.given(self.task.loss, output)
            if torch.is_grad_enabled():
                loss = task_loss(self.task, output, batch)
            else:  # held out, where any number will do
                assert self.task.loss is not None
                loss = torch.as_tensor(self.task.loss(self.task.wrap(output), batch))
            terms.append(self.task_weight * loss.reshape(()))
        return terms


def measures_of_stage(settings: Alignment, part: str, place: int) -> dict[str, float]:
    """Weights by name, in the stage in which this part is new, the so many-th from 1."""
    given = [
        measures
        for key, measures in settings.stage_measures.items()
        if (key == place if isinstance(key, int) else matches(part, key))
    ]
    return weights_of(given[-1]) if given else settings.measures


def told_of_batches(recipe: Recipe) -> list[str]:
    """Of measures that are no means over examples, where several batches make a step."""
    count = recipe.gradient_accumulation
    apart = [name for name in recipe.alignment.all_measures if not get_measure(name).additive]
    if count == 1 or recipe.alignment.schedule == "stochastic" or not apart:
        return []
    return [f"{', '.join(apart)}: of each batch by itself, not of all examples of the {count} batches that make a step"]


def _weight(part: str, weights: Mapping[str, float]) -> float:
    fitting = [weight for glob, weight in weights.items() if matches(part, glob)]
    return fitting[-1] if fitting else 1.0


def _summed(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(list(terms)).sum()


def faint(guide_NP: torch.Tensor) -> bool:
    """Whether examples vary, but so little that one step of a weight moves them by many times as much.

    Deep guides with random weights are like that, each layer 1e-3 of the one before.
    """
    return guide_NP.shape[0] > 1 and 0 < float(guide_NP.std(0).amax()) < _FAINT
