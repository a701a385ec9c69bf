"""Parts that are aligned independently, spread over ranks: each rank has its own, and trains them on the rows of all.

The guide runs on a rank's own rows; what it makes at a part's ends goes to the rank that has the part. No gradient is
exchanged: of a step the loss and the length of the gradient, which are numbers. Weights are handed to all ranks where
the hybrid is judged as a whole, and for a checkpoint, which is the one that a process by itself would write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thesean import exchange, ranks
from thesean.distill.masters import Masters
from thesean.distill.training import Training
from thesean.journal import Stateful
from thesean.kernels.shared.precision import HALF
from thesean.passes.plan.hybrid import Hybrid, Replacement


def spread(hybrid: Hybrid, training: Training) -> Spread | None:
    """None where parts are not each by itself, or a rank would have none."""
    alignment, count = training.recipe.alignment, len(hybrid.parts)
    companions = alignment.output is not None or alignment.task > 0
    if alignment.schedule != "independent" or alignment.reads != "guide" or companions or training.recipe.sharded:
        return None
    weights = hybrid.parameters_of(range(count))
    tied = len(set(map(id, weights))) < len(weights)
    return None if tied or not 1 < ranks.count() <= count else Spread(hybrid, training)


class Spread:
    """Which rank has which parts, and what they exchange."""

    def __init__(self, hybrid: Hybrid, training: Training) -> None:
        self.hybrid, self.seed, self.gathered = hybrid, training.seed, training.gathered
        self._rank = ranks.number()  # here, and where it is apart from the others
        self._owners = [ranks.owner_of(part, len(hybrid.parts)) for part in range(len(hybrid.parts))]

    def has(self, part: int) -> bool:
        """Whether it is this rank's."""
        return self._owners[part] == self._rank

    def received(
        self, values: Mapping[str, Any], replacements: Sequence[Replacement], masks: Sequence[str]
    ) -> dict[str, Any]:
        """All rows of the guide's values that this rank's replacements read and are compared with, and of masks;
        `values` are of its own rows, `replacements` those of all ranks.
        """
        found = dict(self.gathered.values({name: values[name] for name in masks}))
        sent = [(self._owners[r.part], name) for r in replacements for name in (r.guide_entry, r.guide_exit)]
        for owner, name in dict.fromkeys(sent):
            value = self.gathered.at(name, values[name], owner)
            if owner == self._rank:
                found[name] = value
        return found

    def total(self, step: int, terms_of: Callable[[], Sequence[torch.Tensor]]) -> torch.Tensor:
        """The sum over ranks of the losses of their own parts, of all rows. What parts draw is a rank's own: what is
        drawn elsewhere, such as the order of data, stays alike.
        """
        device = next(self.hybrid.graph_module.parameters()).device
        terms = [torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)]

        def compute() -> None:
            with torch.random.fork_rng(devices=[]), ranks.apart():
                torch.default_generator.manual_seed(self.seed + step * len(self._owners) + self._rank)
                terms.extend(term.double() for term in terms_of())

        ranks.everywhere(compute)
        return exchange.total(torch.stack(terms).sum())

    def masters(self, weights: Sequence[nn.Parameter]) -> Masters:
        return _Own(weights, self)

    @torch.no_grad()
    def hand_out(self) -> None:
        """All parts' weights and buffers become those of the ranks that have them."""
        owners = {self.hybrid.module(r): self._owners[r.part] for r in self.hybrid.replacements}
        for module, owner in owners.items():
            for value in module.state_dict().values():
                exchange.hand_out(value, owner)

    def weights(self) -> list[nn.Parameter]:
        """Of this rank's own parts."""
        return self.hybrid.parameters_of([part for part in range(len(self._owners)) if self.has(part)])


class _Own(Masters):
    """Masters that move a rank's own weights alone: others have no gradient, which an optimizer passes over. What a
    checkpoint holds is what `Masters` would: it goes on with any number of ranks.
    """

    def __init__(self, weights: Sequence[nn.Parameter], spread: Spread) -> None:
        self._spread, self._moved = spread, {id(weight) for weight in spread.weights()}
        super().__init__(weights)
        self.own = {id(p) for p, weight in zip(self.parameters, weights, strict=True) if id(weight) in self._moved}

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        return super()._master(weight) if id(weight) in self._moved else weight

    def backward(self, loss: torch.Tensor) -> None:
        with ranks.apart():  # where activations are computed anew
            super().backward(loss)

    def _add_up(self) -> None:
        """They are of all rows already."""

    def _finite(self) -> bool:
        return not ranks.any_of(not super()._finite())

    def clip(self, most: float) -> None:
        """By a norm over the parts of all ranks."""
        gradients = self._gradients
        squares = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        for gradient in gradients:
            squares += gradient.square().sum()
        norm = exchange.added(squares, "norms").sqrt()
        if gradients:
            torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0).item())

    def state_dict(self) -> dict[str, Any]:
        self._spread.hand_out()
        state = super().state_dict()
        if any(weight.dtype in HALF for weight in self._weights):
            own = {k: p.detach().cpu() for k, p in enumerate(self.parameters) if p is not self._weights[k]}
            for theirs in exchange.at_first(own):
                for number, value in theirs.items():
                    state["weights"][number] = value
        return state

    def kept(self, optimizer: torch.optim.Optimizer) -> Stateful:
        return _States(optimizer, self)


class _States:
    """An optimizer's state as it would be of the parts of all ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: _Own) -> None:
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._own = {place for place, parameter in enumerate(parameters) if id(parameter) in masters.own}

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        own = {place: {k: v.cpu() for k, v in values.items()} for place, values in state["state"].items()}
        found = {place: values for theirs in exchange.at_first(own) for place, values in theirs.items()}
        return {**state, "state": dict(sorted(found.items()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {place: values for place, values in state["state"].items() if place in self._own}
        self.optimizer.load_state_dict({**state, "state": own})
