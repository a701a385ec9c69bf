"""Gated depthwise convolutions over time: each channel mixes a window of its own past.

B batch, T time, D width of the part, E channels, K taps, R steps of memory
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from thesean.kernels.shared.precision import widen
from thesean.targets.shared.copying import copy_value
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.lookahead import Late
from thesean.targets.shared.module import State
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceTarget,
    SmallLinear,
    WidthOptions,
    check_sequence,
    reads_both_ways,
    sequence_frame,
    steps_ahead,
)
from thesean.targets.shared.steps import Steps, hide, last

# Steps over which the initial taps fall by e. Solved in closed form on the demo's guide, taps that all start alike
# loud make the long windows worse than the short ones: benchmarks/results/convolutions.json
NEAR = 2.0


class Conv1d(SequenceTarget):
    """y_t = last(silu(g_t) * sum_k w_k v_{t - k d}), per channel; v and g are affine in x_t.

    Gated convolutions: Dauphin et al. 2017, eq. 1, here depthwise; dilations d: van den Oord et al. 2016. The channels
    are shared out among the dilations, neighbours together, as heads are. x_BTD, state_BRE -> (y_BTD, state_BRE): the
    state is the last R = (K - 1) max(d) values, zeros before a sequence's start. Bidirectional: windows centred on t.
    With a look-ahead of k steps windows end at t + k, and g is that of t.
    """

    family = "conv-1d"
    reads_mask = True
    looks_ahead = True
    saved = ("width", "kernel", "dilations")

    def __init__(
        self,
        *,
        width: int,
        kernel: int,
        dilations: list[int],
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        self.width = width
        self.kernel = kernel
        self.dilations = tuple(dilations)
        share, rest = divmod(width, len(dilations))
        self.shares = [share + (i < rest) for i in range(len(dilations))]
        self.memory = (kernel - 1) * max(dilations)
        self.value = nn.Linear(self.width_in, width)
        self.gate = nn.Linear(self.width_in, width)
        self.taps_EK = nn.Parameter(torch.empty(width, kernel))
        self.last = SmallLinear(width, self.width_out)
        self.reset_projections()

    @torch.no_grad()
    def reset_projections(self) -> None:
        for linear in (self.value, self.gate):
            nn.init.normal_(linear.weight, std=self.width_in**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.gate.bias)  # open at the start
        # random, and the nearer the louder
        own = self.kernel // 2 if self.bidirectional else self.kernel - 1 - self.lookahead
        steps_K = torch.arange(self.kernel) - own
        loudness_K = torch.exp(-steps_K.abs() / NEAR)
        self.taps_EK.normal_().mul_(loudness_K / loudness_K.norm())

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.memory, self.width)

    def mix(
        self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, State | None]:
        value_BTE = hide(self.value(x_BTD), steps)
        if state is None:
            after = self.memory // 2
            past_BTE = F.pad(value_BTE, (0, 0, self.memory - after, after))
        else:
            past_BTE = torch.cat([state, value_BTE], 1)
            state = last(past_BTE, self.memory, steps)
        mixed, start = [], 0
        for dilation, share in zip(self.dilations, self.shares, strict=True):
            columns = slice(start, start + share)
            unread = self.memory - (self.kernel - 1) * dilation  # steps that only longer dilations reach
            before = unread if state is not None else unread - unread // 2
            window_BTE = past_BTE[:, before : past_BTE.shape[1] - (unread - before), columns]
            # wide: torch 2.13 doesn't come back from one of 16 taps or more in float16 on a CPU
            window_BTE, taps_EK = widen(window_BTE, self.taps_EK[columns])
            mixed.append(F.conv1d(window_BTE.mT, taps_EK.unsqueeze(1), dilation=dilation, groups=share))
            start += share
        own_BTD = x_BTD if late is None else late(x_BTD)
        return torch.cat(mixed, 1).mT.to(x_BTD.dtype) * F.silu(self.gate(own_BTD)), state

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """The guide's value projection, as many whole copies as fit; nothing where the part has no attention."""
        return ("value",) if copy_value(self.value, part) else ()


class Conv1dOptions(WidthOptions):
    """Width rule: E = `width`, or `expand` times the part's width, shared out among the dilations.

    A channel of dilation d sees `kernel` steps, d apart: (kernel - 1) d + 1 in all. Bidirectional windows are centred,
    so that an even kernel gets one tap more there. With a look-ahead of k there are k taps more.
    """

    kernel: int = Field(default=8, ge=2)
    dilations: tuple[int, ...] = Field(default=(1,), min_length=1)


def check(part: PartFacts, options: Conv1dOptions) -> None:
    check_sequence("conv-1d", part)
    width = options.features_width(part)
    if min(options.dilations) < 1 or len(options.dilations) > width:
        raise part.mismatch(
            "conv-1d",
            found=f"dilations {list(options.dilations)} for {width} channels",
            expected="dilations of 1 or more, at most one a channel",
            advice="Set dilations=[1], or a larger width.",
        )


def build(part: PartFacts, options: Conv1dOptions) -> Conv1d:
    centred = reads_both_ways(part, options)
    return Conv1d(
        width=options.features_width(part),
        kernel=options.kernel + (centred and options.kernel % 2 == 0) + steps_ahead(part, options),
        dilations=list(options.dilations),
        **sequence_frame(part, options),
    )


TARGET = Family(
    name="conv-1d",
    summary="gated depthwise convolution over time; causal ones carry their window",
    options=Conv1dOptions,
    module=Conv1d,
    build=build,
    scope="mixing",
    check=check,
)
