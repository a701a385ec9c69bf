"""The base of all modules that replace a part.

B batch, T time, D width of the part, E width of the target's features
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from thesean.targets.shared.facts import PartFacts

# What a recurrent module carries from step to step: one tensor or a few, batch first, zeros at a sequence's start
State = torch.Tensor | tuple[torch.Tensor, ...]


class TargetModule(nn.Module):
    """The base of all replacements. The output is `last(features)`, so that `last` can be solved in closed form.

    A stateful module's `forward(x_BTD, state=None)` returns `(y_BTD, state)`; running T steps at once equals T
    single steps, and no state means a sequence's start. A state is one tensor or a tuple of them, batch first, zeros at
    the start. Other modules return `y` alone.
    """

    family: ClassVar[str]
    reads_mask: ClassVar[bool] = False  # a `MaskReader` that keeps its promise
    stateful: bool = False
    last: nn.Linear  # a module without one has nothing to solve in closed form, and a forward of its own

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON values only: `type(self)(**config())` has the same shapes."""
        raise NotImplementedError(f"{type(self).__name__}.config")

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """What `last` reads, (..., E), and the state after it (None when stateless)."""
        raise NotImplementedError(f"{type(self).__name__}.features")

    def shape(self, y: torch.Tensor) -> torch.Tensor:
        """From `last`'s output to the part's output shape."""
        return y

    def unshape(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of `shape`, but for leading dimensions: what `last` gives where the part should give y."""
        return y

    def wanted(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What `shape(last(features))` and what is skipped should add up to where the part should give y: y itself,
        unless an activation comes after them.
        """
        return y

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to `shape(last(features))`, None for nothing: a closed-form fit of `last` subtracts it."""
        return None

    def forward(self, x: torch.Tensor, state: State | None = None) -> Any:
        return self.complete(x, *self.features(x, state))

    def complete(
        self, x: torch.Tensor, features: torch.Tensor, state: State | None, mask: torch.Tensor | None = None
    ) -> Any:
        """The output where the features are known; steps that `mask` hides get nothing but what is skipped."""
        y = self.shape(self.last(features))
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0.0)
        skip = self.skip(x)
        if skip is not None:
            y = y + skip
        return (y, state) if self.stateful else y

    def initial_state(self, x: torch.Tensor) -> State:
        """The state that starts a sequence, batch first: zeros, (B, ...), or a tuple of such tensors."""
        raise NotImplementedError(f"{type(self).__name__}.initial_state")

    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Copy whatever of the guide's weights fits; names what was copied."""
        return ()

    def unlike(self, part: PartFacts) -> str:
        """Where it takes over what the part computes, what of that it doesn't know: for the plan. "" for nothing."""
        return ""

    def kept(self) -> str:
        """What of the guide's own computation stays in it, for the plan. "" for nothing."""
        return ""

    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose with data what `copy_from` can't: called once, after it and before the closed form, without gradients.

        `examples` are pairs of the guide's own activations at the part's entry and exit, one a batch.
        """

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        """Multiply-adds times two for one forward at these sizes of the dynamic dimensions."""
        return 2 * part.rows(sizes) * sum(p.numel() for p in self.parameters() if p.ndim >= 2)


class MaskReader(TargetModule):
    """A module over (B, T, D) that can be told which steps hold a token, (B, T) booleans.

    A step that `mask` hides leaves the state as it was, is not read by the others, and gives nothing, so that each row
    is what it would be alone. A hybrid hands the mask over where the guide reads one.
    """

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        return self.masked_features(x, state, None)

    def masked_features(
        self, x: torch.Tensor, state: State | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State | None]:
        """`features` where some steps may hold no token; what those get makes no difference."""
        raise NotImplementedError(f"{type(self).__name__}.masked_features")

    def forward(self, x: torch.Tensor, state: State | None = None, *, mask: torch.Tensor | None = None) -> Any:
        return self.complete(x, *self.masked_features(x, state, mask), mask)
