"""What the recurrent families share: the shapes they take, their options, and the residual block around a core.

B batch, T time, D width of the part, E width of the target's features
"""

from __future__ import annotations

from typing import Any, ClassVar, Required, TypedDict

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Options
from thesean.targets.shared.lookahead import InPlace, Late, ended
from thesean.targets.shared.module import MaskReader, State
from thesean.targets.shared.steps import Steps


class SequenceOptions(Options):
    """`residual` and `norm` make a whole block of the module: y = x + last(core(LayerNorm(x))).

    The sum is left out where the part changes the width. `build_module` sets both for `Target(..., scope="part")`.
    """

    residual: bool = False
    norm: bool = False
    causal: bool = Field(default=False, description="read no later step, whatever the part reads: for streams")
    lookahead: int = Field(
        default=0, ge=0, description="read so many later steps where the part reads them all; a stream comes as late"
    )


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
    lookahead: int


class SequenceTarget(MaskReader):
    """A module over (B, T, D). Subclasses set `last` and define `mix` and `core_state`.

    Causal ones carry a state; a bidirectional one has nothing to carry: the future has not been read yet. `saved` names
    a family's own constructor arguments, kept as attributes of these names: `config` saves them beside the frame.
    One that `reads_mask` takes a third argument in `mix`: `steps`, None where every step holds a token.

    With a `lookahead` of k, outputs of a whole sequence read k steps past their own. Given a state, the module is a
    stream that doesn't have these yet: its outputs come k steps late, the first k are void, and k steps that `mask`
    hides bring the last ones. Hidden steps of a stream stand before a row's first token and after its last. For
    families that say `looks_ahead`: `mix` takes a fourth argument, `late`, and calls it on what a step asks with;
    `late_width` counts the columns.
    """

    saved: ClassVar[tuple[str, ...]] = ()
    looks_ahead: ClassVar[bool] = False
    last: nn.Linear

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        bidirectional: bool = False,
        residual: bool = False,
        norm: bool = False,
        lookahead: int = 0,
    ) -> None:
        super().__init__()
        if lookahead and (bidirectional or not self.looks_ahead):
            kind = "bidirectional, which reads all steps" if bidirectional else "of a family that can't look ahead"
            raise ValueError(f"lookahead={lookahead} for a module {kind}")
        self.width_in = width_in
        self.width_out = width_out
        self.bidirectional = bidirectional
        self.directions = 2 if bidirectional else 1
        self.stateful = not bidirectional
        self.residual = residual
        self.norm: nn.Module | None = nn.LayerNorm(width_in) if norm else None
        self.lookahead = lookahead

    def config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.saved}
        return {
            "width_in": self.width_in,
            "width_out": self.width_out,
            "bidirectional": self.bidirectional,
            "residual": self.residual,
            "norm": self.norm is not None,
            **({"lookahead": self.lookahead} if self.lookahead else {}),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
        }

    def mix(self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None) -> tuple[torch.Tensor, State | None]:
        """features_BTE and the state after them; `state` is None exactly when the module is bidirectional. Under
        `steps` the tokens of x stand in front of what is hidden; what the features are there makes no difference. With
        `late` given too, hidden steps may stand on both sides, and their features are those of a step that asks late.
        """
        raise NotImplementedError(f"{type(self).__name__}.mix")

    def core_state(self, x: torch.Tensor) -> State:
        """What `mix` starts from: zeros, batch first."""
        raise NotImplementedError(f"{type(self).__name__}.core_state")

    @property
    def late_width(self) -> int:
        return self.width_in

    def initial_state(self, x: torch.Tensor) -> State:
        if not self.lookahead:
            return self.core_state(x)
        widths = (self.late_width, *((self.width_in,) if self.residual else ()))
        held = (x.new_zeros(x.shape[0], self.lookahead, width) for width in widths)
        return (*_tensors(self.core_state(x)), *held)

    def masked_features(
        self, x: torch.Tensor, state: State | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State | None]:
        if self.lookahead and self.stateful:
            return self._whole(x, mask) if state is None else self._stream(x, state, None, mask)[1:]
        if self.stateful and state is None:
            state = self.initial_state(x)
        x, state = x if self.norm is None else self.norm(x), state if self.stateful else None
        if mask is None:
            return self.mix(x, state)
        steps = Steps(mask)
        features, state = self.mix(steps.to_front(x), state, steps)
        return steps.back(features), state

    def forward(self, x: torch.Tensor, state: State | None = None, *, mask: torch.Tensor | None = None) -> Any:
        if not self.lookahead or state is None:
            return super().forward(x, state, mask=mask)
        x, features, state = self._stream(x, state, None, mask)
        return self.complete(x, features, state)  # hidden steps are where the last tokens' outputs come

    def _whole(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        """All rows from their start to their end. The state is that of a stream that has ended."""
        rows = None if mask is None else Steps(mask)
        x_BSD = F.pad(x if rows is None else rows.to_front(x), (0, 0, 0, self.lookahead))
        steps = ended(x_BSD, self.lookahead)
        if rows is not None:
            steps = InPlace(F.pad(rows.seen_BT, (0, self.lookahead)))
        _, features_BSE, state = self._stream(x_BSD, self.initial_state(x), steps)
        features_BTE = features_BSE[:, self.lookahead :]
        return features_BTE if rows is None else rows.back(features_BTE), state

    def _stream(
        self, x: torch.Tensor, state: State, steps: Steps | None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, State]:
        """(the inputs that the outputs belong to, features, state)."""
        held = 2 if self.residual else 1
        core, (asked, *skipped) = _tensors(state)[:-held], _tensors(state)[-held:]
        steps = InPlace(mask) if steps is None and mask is not None else steps
        late, skip = Late(asked), Late(skipped[0]) if self.residual else None
        normed = x if self.norm is None else self.norm(x)
        mix: Any = self.mix  # of a family that looks ahead
        features, after = mix(normed, core if len(core) > 1 else core[0], steps, late)
        x = x if skip is None else skip(x)
        return x, features, (*_tensors(after), late.state, *(() if skip is None else (skip.state,)))

    def skip(self, x: torch.Tensor) -> torch.Tensor | None:
        return x if self.residual and self.width_in == self.width_out else None


def _tensors(state: State) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def check_sequence(target: str, part: PartFacts) -> None:
    """Raises TargetMismatchError unless the part maps (batch, time, width) to (batch, same time, width)."""
    shapes = f"{describe(part.input_shape)} -> {describe(part.output_shape)}"
    if not part.is_sequence:
        raise part.mismatch(
            target,
            found=f"{shapes}{', channels first' if part.channels_first else ''}",
            expected="a sequence (batch, time, width) in and out",
            advice=f"Choose target 'mlp' for it, or keep it with {part.keep}.",
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
            advice=f"Keep it with {part.keep} and convert the parts around it.",
        )


def describe(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def reads_both_ways(part: PartFacts, options: SequenceOptions) -> bool:
    """Whether a part's module sees all later steps: as the part does, unless a causal one is asked for, which one with
    a look-ahead is.
    """
    return part.mixing == "bidirectional" and not options.causal and not options.lookahead


def steps_ahead(part: PartFacts, options: SequenceOptions) -> int:
    """Steps past its own that an output may read: those asked for, where the part reads later ones at all."""
    return options.lookahead if part.mixing == "bidirectional" else 0


def sequence_frame(part: PartFacts, options: SequenceOptions) -> SequenceFrame:
    """The frame of a part's module; token-wise parts get a causal one."""
    ahead = steps_ahead(part, options)
    frame: SequenceFrame = {
        "width_in": part.width_in,
        "width_out": part.width_out,
        "bidirectional": reads_both_ways(part, options),
        "residual": options.residual,
        "norm": options.norm,
    }
    return {**frame, "lookahead": ahead} if ahead else frame


class SmallLinear(nn.Linear):
    """A last layer that starts near zero: the hybrid starts near "this part says nothing", not at noise. What starts
    from scratch, all of it noise, does better with torch's own start: `reset_parameters`.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
