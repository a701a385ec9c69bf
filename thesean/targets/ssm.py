"""A selective diagonal state space behind a short causal convolution, as in Mamba.

B batch, T time, D width of the part, E channels per direction, H heads, P channels of a head, N states of a channel,
W taps of the convolution, R = W - 1
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from pydantic import Field, PositiveFloat
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.copying import copy_value
from thesean.targets.shared.core import Core
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.heads import default_heads
from thesean.targets.shared.lookahead import InPlace, Late, LaterSteps, read_later
from thesean.targets.shared.memory import decay_bias, span, spread
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceTarget,
    SmallLinear,
    WidthOptions,
    check_sequence,
    sequence_frame,
)
from thesean.targets.shared.steps import Steps, flip, hide, last

TAPS = 4

# Tokens that the slowest state of the first and the last head remembers at the start: steps of 0.1 to 0.001, as in
# Gu and Dao 2023, section 3.6. State n forgets n + 1 times as fast.
MEMORY = (10.0, 1000.0)

EPSILON = 1e-6


class SelectiveScan(nn.Module):
    """One direction: u = silu(conv(x)), h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t.

    x_BTE, state (window_BRE, scan_BHNP) -> y_BTE, state. A is negative, one a head and state; B, C and the head's step
    dt read u_t. B and C have unit mean square (Lieber et al. 2024): y grows linearly with u, not with its cube, where a
    guide's activations are large.
    """

    def __init__(self, *, width: int, heads: int, state: int, memory: tuple[float, float]) -> None:
        super().__init__()
        self.heads = heads
        self.state = state
        self.weight_EW = nn.Parameter(torch.empty(width, TAPS))
        self.bias_E = nn.Parameter(torch.zeros(width))
        self.selection = nn.Linear(width, 2 * state, bias=False)
        self.step = nn.Linear(width, heads)
        self.rate_HN = nn.Parameter(torch.empty(heads, state))  # log(-A)
        self.direct_E = nn.Parameter(torch.ones(width))
        self.convolution = Core("causal_convolution", activation="silu")
        self.core = Core("diagonal_scan")
        self.reset_scan(memory)

    @torch.no_grad()
    def reset_scan(self, memory: tuple[float, float]) -> None:
        nn.init.uniform_(self.weight_EW, -(TAPS**-0.5), TAPS**-0.5)
        nn.init.normal_(self.selection.weight, std=self.selection.in_features**-0.5)
        # S4D-real (Gu et al. 2022): A_n = -(n + 1)
        self.rate_HN.copy_(torch.arange(1, self.state + 1).log().expand_as(self.rate_HN))
        # a little selective from the start, around a step of 1 / tokens
        nn.init.normal_(self.step.weight, std=0.1 * self.step.in_features**-0.5)
        self.step.bias.copy_(decay_bias(spread(memory, self.heads)))

    def zeros(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.direct_E.shape[0]
        window_BRE = x.new_zeros(x.shape[0], TAPS - 1, width)
        return window_BRE, x.new_zeros(x.shape[0], self.heads, self.state, width // self.heads)

    def forward(
        self, x_BTE: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], steps: Steps | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        window_BRE, scan_BHNP = state
        if isinstance(steps, InPlace):
            x_BTE = hide(x_BTE, steps)  # where steps stand in place, the window slides over hidden ones too
        past_BSE = None if steps is None else torch.cat([window_BRE, x_BTE], 1)
        u_BTE, window_BRE = self.convolution(x_BTE, self.weight_EW, self.bias_E, window_BRE)
        if past_BSE is not None:
            window_BRE = last(past_BSE, TAPS - 1, steps)
        key_BTN, query_BTN = (
            z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPSILON)
            for z in self.selection(u_BTE).split(self.state, -1)
        )
        step_BTH1 = F.softplus(self.step(u_BTE)).unsqueeze(-1)
        log_decay_BTHN = -self.rate_HN.exp() * step_BTH1
        value_BTHP = step_BTH1 * u_BTE.unflatten(-1, (self.heads, -1))
        log_decay_BTHN, value_BTHP = hide(log_decay_BTHN, steps), hide(value_BTHP, steps)
        # B and C are the same for all heads
        query_BTHN, key_BTHN = (z.unsqueeze(-2).expand_as(log_decay_BTHN) for z in (query_BTN, key_BTN))
        y_BTHP, scan_BHNP = self.core(query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN, scan_BHNP)
        return y_BTHP.flatten(-2) + self.direct_E * u_BTE, (window_BRE, scan_BHNP)


class SSM(SequenceTarget):
    """y = last(scan(x W) * silu(x V)): the block of Gu and Dao 2023, figure 3, one step dt for all channels of a head.

    x_BTD, state (window_BRE, scan_BHNP) -> (y_BTD, state): the convolution's last inputs and the scan's states. With
    as many heads as channels it is Mamba's own scan; fewer run faster everywhere. Bidirectional: a scan of its own in
    each direction.
    """

    family = "ssm"
    reads_mask = True
    looks_ahead = True
    saved = ("width", "heads", "state", "memory")

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        state: int,
        memory: tuple[float, float] = MEMORY,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        self.width = width
        self.heads = heads
        self.state = state
        self.memory = span(memory)
        self.value = nn.Linear(self.width_in, self.directions * width)
        self.gate = nn.Linear(self.width_in, self.directions * width)
        settings: dict[str, Any] = dict(width=width, heads=heads, state=state, memory=self.memory)
        self.ahead = SelectiveScan(**settings)
        self.back = SelectiveScan(**settings) if self.bidirectional else None
        self.later = LaterSteps(width, self.lookahead) if self.lookahead else None
        self.last = SmallLinear(self.directions * width, self.width_out)
        # the gates begin half open: around 0 they would multiply every feature by noise. Solved in closed form on the
        # demo's guide that is 2.08 nats instead of 2.87.
        nn.init.normal_(self.value.weight, std=self.width_in**-0.5)
        nn.init.normal_(self.gate.weight, std=0.7 * self.width_in**-0.5)
        nn.init.zeros_(self.value.bias)
        nn.init.ones_(self.gate.bias)

    def core_state(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ahead.zeros(x)

    @property
    def late_width(self) -> int:
        return self.width + self.width_in

    def mix(
        self,
        x_BTD: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor] | None,
        steps: Steps | None = None,
        late: Late | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        value_BTU = self.value(x_BTD)  # U channels of all directions
        if state is not None:
            features_BTU, state = self.ahead(value_BTU, state, steps)
            features_BTU = read_later(self.later, features_BTU, late)
        else:
            assert self.back is not None
            ahead_BTE, back_BTE = value_BTU.split(self.width, -1)
            ahead_BTE, _ = self.ahead(ahead_BTE, self.ahead.zeros(x_BTD), steps)
            back_BTE, _ = self.back(flip(back_BTE, steps), self.back.zeros(x_BTD), steps)
            features_BTU = torch.cat([ahead_BTE, flip(back_BTE, steps)], -1)
        own_BTD = x_BTD if late is None else late(x_BTD)
        return features_BTU * F.silu(self.gate(own_BTD)), state

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """The guide's value projection, as many whole copies as fit; nothing where the part has no attention."""
        return ("value",) if copy_value(self.value, part) else ()

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        linears = [m for m in self.modules() if isinstance(m, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        channels = self.last.in_features
        return 2 * part.rows(sizes) * (weights + channels * (TAPS + 2 * self.state))  # into the states, and out of them


class SSMOptions(WidthOptions):
    """Width rule: E = `width` or `expand` times the part's width, channels a direction, in `heads` heads (one per
    32 channels), each channel with `state` states.
    """

    heads: int | None = Field(default=None, gt=0)
    state: int = Field(default=16, gt=0)
    memory: tuple[PositiveFloat, PositiveFloat] = Field(
        default=MEMORY, description="tokens that the slowest states of the first and last head remember"
    )


def check(part: PartFacts, options: SSMOptions) -> None:
    check_sequence("ssm", part)
    width = options.features_width(part)
    if options.heads is not None and width % options.heads:
        raise part.mismatch(
            "ssm",
            found=f"width {width} with {options.heads} heads",
            expected="a width that the heads divide",
            advice=f"Set heads={default_heads(width)}, or another width.",
        )


def build(part: PartFacts, options: SSMOptions) -> SSM:
    width = options.features_width(part)
    return SSM(
        width=width,
        heads=options.heads or default_heads(width),
        state=options.state,
        memory=options.memory,
        **sequence_frame(part, options),
    )


TARGET = Family(
    name="ssm",
    summary="selective diagonal state space behind a causal convolution (Mamba); small state, long memories",
    options=SSMOptions,
    module=SSM,
    build=build,
    scope="mixing",
    check=check,
)
