"""Token mixing by a perceptron over time, for sequences of one fixed length.

B batch, T time, D width of the part, M hidden units a step
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.module import State
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceOptions,
    SequenceTarget,
    SmallLinear,
    check_sequence,
    describe,
    sequence_frame,
)
from thesean.targets.shared.steps import Steps, hide


class Mixer(SequenceTarget):
    """y = last([x, W2 gelu(W1 x + b1) + b2]), W1 and W2 over time and the same for all channels.

    Token mixing: Tolstikhin et al. 2021, eq. 1. x_BTD -> y_BTD, T as traced. Causal: W1 and W2 are M lower triangular
    T x T blocks each, so that unit (m, t) and output t read steps up to t. There is no state: the length is fixed.
    With a look-ahead of k unit (m, t) reads steps up to t + k.
    """

    family = "mixer"
    reads_mask = True
    looks_ahead = True
    saved = ("length", "expand")

    def __init__(
        self,
        *,
        length: int,
        expand: int,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        self.stateful = False
        self.length = length
        self.expand = expand
        self.first_MTT = nn.Parameter(torch.empty(expand, length, length))
        self.first_bias_MT = nn.Parameter(torch.zeros(expand, length))
        self.second_MTT = nn.Parameter(torch.empty(expand, length, length))
        self.second_bias_T = nn.Parameter(torch.zeros(length))
        self.last = SmallLinear(2 * self.width_in, self.width_out)
        self.reset_mixing()

    @torch.no_grad()
    def reset_mixing(self) -> None:
        # a causal row t sums t + 1 terms, any other T
        ahead = self.length if self.bidirectional else self.lookahead
        steps_T1 = torch.arange(1, self.length + 1).unsqueeze(1)
        read_T1 = (steps_T1 + ahead).clamp_max(self.length)
        units_T1 = torch.full_like(steps_T1, self.length) if self.bidirectional else steps_T1
        nn.init.normal_(self.first_MTT).mul_(read_T1**-0.5)
        nn.init.normal_(self.second_MTT).mul_((self.expand * units_T1) ** -0.5)

    def mix(self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None) -> tuple[torch.Tensor, State | None]:
        x_BTD = hide(x_BTD, steps)
        first_MTT: torch.Tensor = self.first_MTT
        second_MTT: torch.Tensor = self.second_MTT
        if not self.bidirectional:
            first_MTT, second_MTT = first_MTT.tril(self.lookahead), second_MTT.tril()
        hidden = F.gelu(first_MTT.flatten(0, 1) @ x_BTD + self.first_bias_MT.flatten().unsqueeze(1))  # (B, M T, D)
        mixed_BTD = second_MTT.transpose(0, 1).flatten(1) @ hidden + self.second_bias_T.unsqueeze(1)
        return torch.cat([x_BTD, mixed_BTD], -1), None

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        over_time = 2 * self.expand * self.length**2 * self.width_in
        a_sequence = over_time + self.length * self.last.weight.numel()
        return 2 * part.rows(sizes, 1) * a_sequence


class MixerOptions(SequenceOptions):
    """Width rule: `expand` hidden units for each step of the sequence, as the mixers of the paper have 1 to 3."""

    expand: int = Field(default=2, gt=0)


def check(part: PartFacts, options: MixerOptions) -> None:
    check_sequence("mixer", part)
    if isinstance(part.input_shape[1], str):
        raise part.mismatch(
            "mixer",
            found=f"{describe(part.input_shape)} -> {describe(part.output_shape)}",
            expected="a sequence of one fixed length",
            advice="Trace the guide with a fixed length: wrap it in a module whose forward reshapes its input to "
            "(batch, 128), or whatever the length is; or choose target 'conv', which takes any.",
        )


def build(part: PartFacts, options: MixerOptions) -> Mixer:
    return Mixer(length=int(part.input_shape[1]), expand=options.expand, **sequence_frame(part, options))


TARGET = Family(
    name="mixer",
    summary="token mixing by a perceptron over time, for sequences of one fixed length",
    options=MixerOptions,
    module=Mixer,
    build=build,
    scope="mixing",
    check=check,
)
