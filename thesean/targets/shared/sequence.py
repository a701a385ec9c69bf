"""What the recurrent families share: the shapes they take, their options, and the residual block around a core.

B batch, T time, D width of the part, E width of the target's features
"""

from __future__ import annotations

from typing import Any, ClassVar, Required, TypedDict

import torch
from pydantic import Field
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Options
from thesean.targets.shared.module import MaskReader, State
from thesean.targets.shared.steps import Steps


class SequenceOptions(Options):
    """`residual` and `norm` make a whole block of the module: y = x + last(core(LayerNorm(x))).

    The sum is left out where the part changes the width. `build_module` sets both for `Target(..., scope="part")`.
    """

    residual: bool = False
    norm: bool = False
    causal: bool = Field(default=False, description="read no later step, whatever the part reads: for streams")


class WidthOptions(SequenceOptions):
    """Width rule: E = `width`, or `expand` times the part's width; per direction when bidirectional.

    The part's width is the larger of its input and output widths, or its hidden units where it is itself a recurrence.
    """

    width: int | None = Field(default=None, gt=0)
    expand: int = Field(default=1, gt=0)

    def features_width(self, part: PartFacts) -> int:
        return self.width or self.expand * part.features_width


class SequenceFrame(TypedDict, total=False):
    """The constructor arguments that all sequence targets have, beside a family's own."""

    width_in: Required[int]
    width_out: Required[int]
    bidirectional: bool
    residual: bool
    norm: bool


class SequenceTarget(MaskReader):
    """A module over (B, T, D). Subclasses set `last` and define `mix` and `initial_state`.

    Causal ones carry a state; a bidirectional one has nothing to carry: the future has not been read yet. `saved` names
    a family's own constructor arguments, kept as attributes of these names: `config` saves them beside the frame.
    One that `reads_mask` takes a third argument in `mix`: `steps`, None where every step holds a token.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    last: nn.Linear

    def __init__(
        self, *, width_in: int, width_out: int, bidirectional: bool = False, residual: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.bidirectional = bidirectional
        self.directions = 2 if bidirectional else 1
        self.stateful = not bidirectional
        self.residual = residual
        self.norm = nn.LayerNorm(width_in) if norm else None

    def config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.saved}
        return {
            "width_in": self.width_in,
            "width_out": self.width_out,
            "bidirectional": self.bidirectional,
            "residual": self.residual,
            "norm": self.norm is not None,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        }

    def mix(self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None) -> tuple[torch.Tensor, State | None]:
        """features_BTE and the state after them; `state` is None exactly when the module is bidirectional. Under
        `steps` the tokens of x stand in front of what is hidden; what the features are there makes no difference.
        """
        raise NotImplementedError(f"{type(self).__name__}.mix")

    def masked_features(
        self, x: torch.Tensor, state: State | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State | None]:
        if self.stateful and state is None:
            state = self.initial_state(x)
        x, state = x if self.norm is None else self.norm(x), state if self.stateful else None
        if mask is None:
            return self.mix(x, state)
        steps = Steps(mask)
        features, state = self.mix(steps.to_front(x), state, steps)
        return steps.back(features), state

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        return x if self.residual and self.width_in == self.width_out else None


def check_sequence(target: str, part: PartFacts) -> None:
    """Raises TargetMismatchError unless the part maps (batch, time, width) to (batch, same time, width)."""
    shapes = f"{describe(part.input_shape)} -> {describe(part.output_shape)}"
    if not part.is_sequence:
        raise part.mismatch(
            target,
            found=f"{shapes}{', channels first' if part.channels_first else ''}",
            expected="a sequence (batch, time, width) in and out",
            advice=f"Choose target 'mlp' for it, or keep it with keep=[{part.path!r}].",
        )
    if isinstance(part.input_shape[2], str) or isinstance(part.output_shape[2], str):
        raise part.mismatch(
            target,
            found=shapes,
            expected="static widths",
            advice="Trace the guide with fixed widths: only batch and time may be dynamic.",
        )
    if part.input_shape[1] != part.output_shape[1]:
        raise part.mismatch(
            target,
            found=shapes,
            expected="as many steps out as in",
            advice=f"Keep it with keep=[{part.path!r}] and convert the parts around it.",
        )


def describe(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def reads_both_ways(part: PartFacts, options: SequenceOptions) -> bool:
    """Whether a part's module sees later steps: as the part does, unless a causal one is asked for."""
    return part.mixing == "bidirectional" and not options.causal


def sequence_frame(part: PartFacts, options: SequenceOptions) -> SequenceFrame:
    """The frame of a part's module; token-wise parts get a causal one."""
    return {
        "width_in": part.width_in,
        "width_out": part.width_out,
        "bidirectional": reads_both_ways(part, options),
        "residual": options.residual,
        "norm": options.norm,
    }


def small_linear(width_in: int, width_out: int) -> nn.Linear:
    """A last layer that starts near zero: the hybrid starts near "this part says nothing", not at noise."""
    linear = nn.Linear(width_in, width_out)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
