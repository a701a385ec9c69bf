"""Float32 copies of half-precision weights, which an optimizer moves in their place.

A step of Adam is a thousandth of a weight, and half precision rounds that off: bf16 has 8 bits, and a weight that is
moved by less than 1/256 of itself stays where it is. So the steps are added up in float32, and the weights of the
network are what those round to (Micikevicius et al. 2018). float16 gradients below 6e-8 vanish, so the loss is scaled
up by what they can bear; a step that overflows is left out, and the scale halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from thesean import exchange
from thesean.errors import DataError
from thesean.journal import Stateful
from thesean.kernels.shared.precision import HALF

_OVERWRITTEN = "modified by an inplace operation"  # torch's words

_SCALE, _LARGEST, _GROWS_AFTER = 2.0**12, 2.0**16, 100


class Masters:
    """`parameters` are what is to be optimised: masters of half-precision weights, all other weights themselves."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights = list(weights)
        self.parameters = [self._master(w) for w in weights]
        self._pairs = [(w, own) for w, own in zip(weights, self.parameters, strict=True) if own is not w]
        self._scaled = any(w.dtype == torch.float16 for w in weights)
        self._scale, self._good = _SCALE if self._scaled else 1.0, 0

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(weight.detach().float()) if weight.dtype in HALF else weight

    def close(self) -> None:
        """No gradient is asked for any more."""

    def clear(self) -> None:
        """Before the losses of a step."""
        for parameter in self.parameters:
            parameter.grad = None

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss` for `parameters` to those of this step, in float32 where weights are in half.

        Raises DataError where code of the caller's wrote into what they are computed of.
        """
        try:
            (loss.float() * self._scale if self._scaled else loss).backward()
        except RuntimeError as error:
            if _OVERWRITTEN not in str(error):
                raise
            raise DataError(
                "a tensor that gradients are computed of was changed in place: by loss(output, batch), which may not "
                f"write into its batch, or by a module of yours. Let it make its own, batch.clone() first. ({error})"
            ) from error
        for weight, master in self._pairs:
            if weight.grad is not None:
                more, weight.grad = weight.grad.float(), None
                master.grad = more if master.grad is None else master.grad.add_(more)

    def finish(self) -> bool:
        """Gradients become those of the rows of all ranks; False where they overflowed, and the step is left out."""
        self._add_up()
        if not self._scaled:
            return True
        if not self._finite():
            self._scale, self._good = self._scale / 2, 0
            return self._scale < 1  # what overflows unscaled is the network's own, and told as such
        for gradient in self._gradients:
            gradient.div_(self._scale)
        self._good += 1
        if self._good % _GROWS_AFTER == 0:
            self._scale = min(2 * self._scale, _LARGEST)
        return True

    @property
    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _add_up(self) -> None:
        exchange.add_up(self._gradients, "gradients")

    def _finite(self) -> bool:
        return all(bool(g.isfinite().all()) for g in self._gradients)

    def clip(self, most: float) -> None:
        """Gradients that are longer together than this become as long."""
        nn.utils.clip_grad_norm_(self.parameters, most)

    @torch.no_grad()
    def write(self) -> None:
        """The network's weights become what their masters round to."""
        for weight, master in self._pairs:
            weight.copy_(master)

    def kept(self, optimizer: torch.optim.Optimizer) -> Stateful:
        """Its state as checkpoints hold it."""
        return optimizer

    def spread(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """A tensor that belongs to a parameter, as a checkpoint holds it."""
        return value

    def cut(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """What `spread` gave, as it belongs to the parameter here."""
        return value

    def state_dict(self) -> dict[str, Any]:
        """With the weights, masters or not."""
        return {
            "weights": [p.detach() for p in self.parameters],
            "scale": self._scale,
            "good": self._good,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for parameter, value in zip(self.parameters, state["weights"], strict=True):
            parameter.copy_(value)
        self._scale, self._good = state["scale"], state["good"]
        self.write()
