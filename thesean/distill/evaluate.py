"""How good a hybrid is on held-out batches: the user's loss and metric, and its divergence from the guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean import ranks
from thesean.distill.gathered import Gathered
from thesean.distill.seen import Seen
from thesean.distill.task import Batch, Task
from thesean.errors import NumericalError
from thesean.passes.graph.intermediates import intermediates


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over held-out batches. `divergence` from the guide: KL in nats for logits, else the normalised MSE, the
    mean over outputs where there are several.
    """

    loss: float | None
    metric: float | None
    divergence: float

    @property
    def value(self) -> float:
        """What training is judged by, lower is better: the user's loss, without one the divergence."""
        return self.loss if self.loss is not None else self.divergence

    def told(self, whose: str) -> tuple[str, ...]:
        """What to tell of means that are no numbers."""
        means = (("loss", self.loss), ("metric", self.metric))
        return tuple(
            f"the {name} of {whose} is {mean} on held-out data: it says nothing"
            for name, mean in means
            if mean is not None and not math.isfinite(mean)
        )


# Guide outputs up to this size, or half of the guide's weights, are kept between evaluations; a large vocabulary's are
# computed anew each time
_KEPT_BYTES = 256 * 2**20

# Batches that decide when a stage ends and choose among states; the whole set is measured once that is over.
_SAMPLED = 4


class Judge:
    """Evaluates hybrids against one guide on the same held-out batches. Batches weigh by their first dimension.

    Of several ranks each has its own rows of `batches`, and judges by the outputs of all.
    """

    def __init__(self, guide: fx.GraphModule, task: Task, batches: Sequence[Batch]) -> None:
        self.guide, self.task, self.gathered = guide, task, Gathered(guide)
        self.batches = [(whole, self.gathered.own(inputs)) for whole, inputs in batches]
        # of whole batches: the same for all ranks
        self.rows = [next(iter(inputs.values())).shape[0] for _, inputs in batches]
        self._kept: dict[int, Any] = {}
        self._bytes = 0
        self._room = max(_KEPT_BYTES, sum(p.numel() * p.element_size() for p in guide.parameters()) // 2)
        self._checked: set[int] = set()
        self._shown: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def everything(self) -> range:
        """The numbers of all batches."""
        return range(len(self.batches))

    @property
    def sample(self) -> Sequence[int]:
        """The numbers of a few batches from all over the set, for neighbours are often of one kind; of all where there
        are no more than a few.
        """
        if len(self.batches) <= _SAMPLED:
            return self.everything
        return [round(k * (len(self.batches) - 1) / (_SAMPLED - 1)) for k in range(_SAMPLED)]

    @torch.no_grad()
    def __call__(self, hybrid: fx.GraphModule, numbers: Sequence[int] | None = None) -> Evaluation:
        """`hybrid` may be the guide itself: its divergence is 0. Raises NumericalError when the guide's output, or its
        loss, by which states are chosen, is NaN or infinite; a hybrid's own loss, and metrics, may be anything.
        """
        if hybrid is self.guide:
            return self.of(None, numbers)
        was_training = hybrid.training
        hybrid.eval()
        found = self.of(lambda number: hybrid(**self.batches[number][1]), numbers)
        hybrid.train(was_training)
        return found

    @torch.no_grad()
    def value(self, hybrid: fx.GraphModule, numbers: Sequence[int] | None = None) -> float:
        """The `Evaluation.value` alone: by the user's loss it takes neither the guide, a large vocabulary's outputs of
        which are computed anew each time, nor the metric. Raises what a call does.
        """
        if self.task.loss is None or hybrid is self.guide:
            return self(hybrid, numbers).value
        loss = self.task.loss

        def loss_on(number: int) -> float:
            batch, inputs = self.batches[number]
            return float(loss(self._given(loss, hybrid(**inputs)), batch))

        was_training = hybrid.training
        hybrid.eval()
        found = self._mean(loss_on, self.everything if numbers is None else numbers)
        hybrid.train(was_training)
        return found

    @torch.no_grad()
    def of(self, output_of: Callable[[int], Any] | None, numbers: Sequence[int] | None = None) -> Evaluation:
        """Of the outputs on the batches of these numbers, all by default; None: the guide's own."""
        total = {"loss": 0.0, "metric": 0.0, "divergence": 0.0}
        rows = 0
        for number in self.everything if numbers is None else numbers:
            batch = self.batches[number][0]
            size = self.rows[number]
            wanted = self.guide_output(number)
            output = wanted if output_of is None else output_of(number)
            if output_of is not None:
                total["divergence"] += self._distance(number, output, wanted) * size
            if self.task.loss is not None:
                loss = float(self.task.loss(self._given(self.task.loss, output), batch))
                if output_of is None and not math.isfinite(loss):
                    raise NumericalError(
                        f"held-out batch {number}: loss(output, batch) is {loss} for the guide's own outputs, "
                        "which are finite: nothing could be judged by it. A mean over no labels is NaN: leave such "
                        "batches out of eval_data=."
                    )
                total["loss"] += loss * size
            if self.task.metric is not None:
                total["metric"] += float(self.task.metric(self._given(self.task.metric, output), batch)) * size
            rows += size
        loss, metric, divergence = ranks.agreed(*(total[name] / rows for name in ("loss", "metric", "divergence")))
        return Evaluation(
            loss=loss if self.task.loss is not None else None,
            metric=metric if self.task.metric is not None else None,
            divergence=divergence,
        )

    def _given(self, function: Any, output: Any) -> Any:
        return self.task.wrap(self.gathered.given(function, output))

    @torch.no_grad()
    def divergence(self, output_of: Callable[[int, Any], Any], numbers: Sequence[int]) -> float:
        """The mean of `of` alone, without the user's loss and metric; the guide's output is told as well."""

        def distance_on(number: int) -> float:
            wanted = self.guide_output(number)
            return self._distance(number, output_of(number, wanted), wanted)

        return self._mean(distance_on, numbers)

    def _mean(self, of: Callable[[int], float], numbers: Sequence[int]) -> float:
        """Batches weigh by their rows."""
        total = sum(of(number) * self.rows[number] for number in numbers)
        return ranks.agreed(total / sum(self.rows[number] for number in numbers))[0]

    def _distance(self, number: int, output: Any, wanted: Any) -> float:
        masks = self._masks(number, self.batches[number][1])
        output, wanted, masks = self.gathered.outputs(self.task.outputs, output, wanted, masks)
        return self.task.outputs.distance(output, wanted, masks=masks).item()

    def _masks(self, number: int, inputs: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Of the outputs that have padded steps."""
        if not self._seen.names:
            return {}
        if number not in self._shown:
            self._shown[number] = self._seen.of_outputs(self._mask_nodes(**inputs))
        return self._shown[number]

    @cached_property
    def _seen(self) -> Seen:
        return Seen(self.guide)

    @cached_property
    def _mask_nodes(self) -> fx.GraphModule:
        return intermediates(self.guide, self._seen.names, with_output=False)

    def learn(self, number: int, output: Any) -> None:
        """The guide's output on a batch, this rank's rows, where someone has it."""
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if self._bytes + size <= self._room:
            self._kept[number] = output
            self._bytes += size

    def known_rows(self, number: int, count: int) -> Any:
        """What the guide makes of the first rows of a batch, where it is in hand and was seen not to hang on others."""
        if number not in self._kept or ranks.count() > 1 or not self.guide.meta.get("rows_apart"):
            return None
        few = self.gathered.some_rows(self._kept[number], count)
        return pytree.tree_map_only(torch.Tensor, torch.clone, few)  # not all of it is held for some rows

    def forget(self) -> None:
        """Let go of the guide's outputs: nothing more is judged for now."""
        self._kept, self._bytes = {}, 0

    @torch.no_grad()
    def guide_output(self, number: int) -> Any:
        """On a batch, this rank's rows. Raises NumericalError for NaN and infinities."""
        output = self._kept.get(number)
        if output is None:
            output = self.guide(**self.batches[number][1])
            self.learn(number, output)
        if number not in self._checked:
            ranks.everywhere(partial(self.task.outputs.check_finite, output, f"held-out batch {number}"))
            self._checked.add(number)
        return output
