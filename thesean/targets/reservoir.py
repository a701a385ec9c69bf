"""An echo state network: a fixed random recurrence of which only the readout is fitted.

B batch, T time, D width of the part, E units per direction, U units of all directions, G blocks, P units of a block,
S = U + D what the readout reads
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from pydantic import Field, PositiveFloat
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.core import Core
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.lookahead import InPlace, Late, LaterSteps, read_later
from thesean.targets.shared.memory import span, spread
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceOptions,
    SequenceTarget,
    SmallLinear,
    check_sequence,
    sequence_frame,
)
from thesean.targets.shared.steps import Steps, flip

# Tokens over which the first and the last unit average, the others geometrically between. Solved in closed form on the
# demo's guide (one seed): 1.636 nats, 1.649 with 1/3 to 64.
MEMORY = (1 / 3, 16.0)

# Standard deviation of what standardised inputs add up to in a unit. Small ones keep tanh near its linear middle, where
# the past survives: with 1/3 to 64 tokens 1.649 nats, against 1.653 at 0.1, 1.669 at 0.5, 1.727 at 1 and 1.820 at 2.
INPUT_SCALE = 0.25

# Below 1 every state forgets where it began, whatever the input (Jaeger 2001, proposition 3).
RADIUS = 0.9

# Units of a block. In onnxruntime 1.32 (512 units, 512 steps, 1 thread) 8 blocks of 64 in a Scan take 4.4 ms, one block
# of 512 takes 12.7 ms, and so does the RNN operator, which has no leak.
_BLOCK = 64


class Reservoir(SequenceTarget):
    """y = last([h_t, x_t]), h_t = (1 - a) h_{t-1} + a tanh(R h_{t-1} + V x_t + b), x standardised by the guide's data.

    Jaeger 2001; leaky units: Jaeger et al. 2007. R is block-diagonal, each block orthogonal times `radius`; the leaks a
    average over 1/3 token to 16. R, V, a and b are fixed, saved and never trained: only `last` is, best in closed form.
    x_BTD, state_BE -> (y_BTD, state_BE). Bidirectional: as many units again read the sequence backwards.
    """

    family = "reservoir"
    reads_mask = True
    looks_ahead = True
    saved = ("width", "heads", "radius", "input_scale", "memory")

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        radius: float = RADIUS,
        input_scale: float = INPUT_SCALE,
        memory: tuple[float, float] = MEMORY,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        if self.norm is not None:
            self.norm = nn.LayerNorm(self.width_in, elementwise_affine=False)  # nothing to train in it
        self.width = width
        self.heads = heads
        self.radius = float(radius)
        self.input_scale = float(input_scale)
        self.memory = span(memory)
        units, blocks = self.directions * width, self.directions * heads
        self.mean_D: torch.Tensor
        self.gain_D: torch.Tensor
        self.input_UD: torch.Tensor
        self.bias_U: torch.Tensor
        self.recurrent_GPP: torch.Tensor
        self.leak_U: torch.Tensor
        self.register_buffer("mean_D", torch.zeros(self.width_in))
        self.register_buffer("gain_D", torch.ones(self.width_in))
        self.register_buffer("input_UD", torch.randn(units, self.width_in) * self.input_scale * self.width_in**-0.5)
        self.register_buffer("bias_U", torch.empty(units).uniform_(-0.5, 0.5))
        blocks_GPP = torch.empty(blocks, width // heads, width // heads)
        for block_PP in blocks_GPP:
            nn.init.orthogonal_(block_PP, self.radius)
        self.register_buffer("recurrent_GPP", blocks_GPP)
        self.register_buffer("leak_U", -torch.expm1(-1 / spread(self.memory, width)).repeat(self.directions))
        self.core = Core("leaky_recurrence")
        self.later = LaterSteps(width, self.lookahead).requires_grad_(False) if self.lookahead else None
        self.last = SmallLinear(units + self.width_in, self.width_out)

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Standardise what the units read: mean 0 and variance 1 of each of the part's inputs over the examples."""
        inputs_ND = torch.cat([(x if self.norm is None else self.norm(x)).flatten(0, 1) for x, _ in examples])
        std_D, mean_D = torch.std_mean(inputs_ND.double(), dim=0, correction=0)
        # an input that hardly varies is not blown up to the size of the others
        floor = 0.01 * std_D.mean().clamp_min(torch.finfo(torch.float32).tiny)
        self.mean_D.copy_(mean_D)
        self.gain_D.copy_(1 / std_D.clamp_min(floor))

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.width)

    def mix(
        self, x_BTD: torch.Tensor, state: torch.Tensor | None, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_BTD = (x_BTD - self.mean_D) * self.gain_D
        drive_BTU = F.linear(x_BTD, self.input_UD, self.bias_U)
        if state is not None and isinstance(steps, InPlace):
            start_BE = state
            hidden_BTU, state = steps.over_tokens(lambda z, steps: self._run(z, start_BE, steps), drive_BTU, start_BE)
        elif state is not None:
            hidden_BTU, state = self._run(drive_BTU, state, steps)
        else:
            start_BU = x_BTD.new_zeros(x_BTD.shape[0], 2 * self.width)
            hidden_BTU, _ = self.core(self.mirrored(drive_BTU, steps), self.recurrent_GPP, self.leak_U, start_BU)
            hidden_BTU = self.mirrored(hidden_BTU, steps)
        hidden_BTU = read_later(self.later, hidden_BTU, late)
        return torch.cat([hidden_BTU, x_BTD if late is None else late(x_BTD)], -1), state

    @property
    def late_width(self) -> int:
        return self.width + self.width_in

    def _run(
        self, drive_BTU: torch.Tensor, before_BE: torch.Tensor, steps: Steps | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BTU, after_BE = self.core(drive_BTU, self.recurrent_GPP, self.leak_U, before_BE)
        return hidden_BTU, after_BE if steps is None else steps.state(hidden_BTU, before_BE)

    def mirrored(self, z_BTU: torch.Tensor, steps: Steps | None) -> torch.Tensor:
        """Time reversed for the units that read backwards; its own inverse."""
        ahead_BTE, back_BTE = z_BTU.split(self.width, -1)
        return torch.cat([ahead_BTE, flip(back_BTE, steps)], -1)

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        return 2 * part.rows(sizes) * (self.input_UD.numel() + self.recurrent_GPP.numel() + self.last.weight.numel())


class ReservoirOptions(SequenceOptions):
    """Width rule: `width` units a direction, or `expand` (4) times the part's width, in `heads` blocks that do
    not see each other (as many as make blocks of 64 units or fewer).
    """

    width: int | None = Field(default=None, gt=0)
    expand: int = Field(default=4, gt=0)
    heads: int | None = Field(default=None, gt=0)
    radius: float = Field(default=RADIUS, gt=0, lt=1, description="spectral radius of the recurrence")
    input_scale: float = Field(default=INPUT_SCALE, gt=0, description="of what the inputs add up to in a unit")
    memory: tuple[PositiveFloat, PositiveFloat] = Field(
        default=MEMORY, description="tokens that the first and last unit average over"
    )


def default_blocks(width: int) -> int:
    """The fewest blocks of one size that have 64 units or fewer."""
    return next(blocks for blocks in range(1, width + 1) if width % blocks == 0 and width // blocks <= _BLOCK)


def check(part: PartFacts, options: ReservoirOptions) -> None:
    check_sequence("reservoir", part)
    width = options.width or options.expand * part.features_width
    if options.heads is not None and width % options.heads:
        raise part.mismatch(
            "reservoir",
            found=f"{width} units in {options.heads} blocks",
            expected="a width that the heads divide",
            advice=f"Set heads={default_blocks(width)}, or another width.",
        )


def build(part: PartFacts, options: ReservoirOptions) -> Reservoir:
    width = options.width or options.expand * part.features_width
    return Reservoir(
        width=width,
        heads=options.heads or default_blocks(width),
        radius=options.radius,
        input_scale=options.input_scale,
        memory=options.memory,
        **sequence_frame(part, options),
    )


TARGET = Family(
    name="reservoir",
    summary="echo state network: a fixed random recurrence, only the readout is solved",
    options=ReservoirOptions,
    module=Reservoir,
    build=build,
    scope="mixing",
    check=check,
)
