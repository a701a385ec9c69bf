"""The gated delta rule on the guide's query, key, value and output projections: a memory that overwrites.

B batch, T time, D width of the part, H heads, F width of a head's query and key, K width of a value
"""

from __future__ import annotations

from typing import Unpack

import torch
from pydantic import Field, PositiveFloat
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.copying import copy_affine
from thesean.targets.shared.core import Core
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.heads import default_heads
from thesean.targets.shared.lookahead import Late
from thesean.targets.shared.memory import decay_bias, later, span, spread
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceOptions,
    SequenceTarget,
    SmallLinear,
    check_sequence,
    describe,
    reads_both_ways,
    sequence_frame,
    steps_ahead,
)
from thesean.targets.shared.steps import Steps, flip, hide

# Tokens that the first and the last head of a direction remember at the start, spread geometrically. Solved in closed
# form on the demo's guide: 1.84 nats, against 1.98 with 2 to 256 tokens and 2.08 with 16 to 1000. Which of the guide's
# heads gets which memory is left to chance; the other way round it is 2.00.
MEMORY = (1 / 3, 64.0)

# inside the root of a norm, so that a vanishing query or key has a gradient
EPSILON = 1e-6


class Delta(SequenceTarget):
    """y = last(q_t S_t), S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, with q and k of length 1 in each head.

    Schlag et al. 2021; the decay a_t, one scalar a head, is Yang, Kautz and Hatamizadeh 2024, eq. 10. All of q, k, v,
    b = sigmoid and a = exp(-softplus) are affine in x_t. x_BTD, state_BHFK -> (y_BTD, state_BHFK). Bidirectional: the
    second half of the heads reads the sequence backwards.
    """

    family = "delta"
    reads_mask = True
    looks_ahead = True
    saved = ("heads", "key_width", "value_width", "memory")

    def __init__(
        self,
        *,
        heads: int,
        key_width: int,
        value_width: int,
        memory: tuple[float, float] = MEMORY,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        if self.bidirectional and heads < 2:
            raise ValueError("a bidirectional delta rule needs 2 heads or more")
        self.memory = span(memory)
        self.heads = heads
        self.ahead = (heads + 1) // 2 if self.bidirectional else heads
        self.key_width = key_width
        self.value_width = value_width
        self.query = nn.Linear(self.width_in, heads * key_width)
        self.key = nn.Linear(self.width_in, heads * key_width)
        self.value = nn.Linear(self.width_in, heads * value_width)
        self.rate = nn.Linear(self.width_in, heads)
        self.decay = nn.Linear(self.width_in, heads)
        self.core = Core("delta_rule")
        self.last = SmallLinear(heads * value_width, self.width_out)
        self.reset_projections()

    @torch.no_grad()
    def reset_projections(self) -> None:
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=self.width_in**-0.5)
            nn.init.zeros_(linear.bias)
        # the same for every token until training says else: half of what is held at a key is replaced
        for linear in (self.rate, self.decay):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.rate.bias)
        shortest, longest = self.memory
        # a head that is alone in its direction should remember
        counts = (self.ahead, self.heads - self.ahead)
        tokens_H = torch.cat([spread((shortest if n > 1 else longest, longest), n) for n in counts])
        self.decay.bias.copy_(decay_bias(tokens_H))

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.heads, self.key_width, self.value_width)

    def mix(
        self, x_BTD: torch.Tensor, state: torch.Tensor | None, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        own_BTD = x_BTD if late is None else late(x_BTD)
        inputs = (
            unit(self.query(own_BTD).unflatten(-1, (self.heads, self.key_width))),
            unit(self.key(x_BTD).unflatten(-1, (self.heads, self.key_width))),
            self.value(x_BTD).unflatten(-1, (self.heads, self.value_width)),
            hide(torch.sigmoid(self.rate(x_BTD)), steps),
            hide(-F.softplus(self.decay(x_BTD)), steps),
        )
        if state is not None:
            out_BTHK, state = self.core(*inputs, state)
        else:
            out_BTHK, _ = self.core(*(self.mirrored(z, steps) for z in inputs), self.core_state(x_BTD))
            out_BTHK = self.mirrored(out_BTHK, steps)
        return out_BTHK.flatten(-2), state

    def mirrored(self, z: torch.Tensor, steps: Steps | None) -> torch.Tensor:
        """(B, T, H, ...) with time reversed for the heads that read backwards; its own inverse."""
        return torch.cat([z[:, :, : self.ahead], flip(z[:, :, self.ahead :], steps)], 2)

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Query, key, value and output projections, each where its shape fits (all, unless options changed widths)."""
        facts = part.attention
        if facts is None or facts.heads != self.heads:
            return ()
        pairs = {
            "query": (self.query, facts.query),
            "key": (self.key, facts.key),
            "value": (self.value, facts.value),
            "output": (self.last, facts.output),
        }
        return tuple(name for name, (linear, affine) in pairs.items() if copy_affine(linear, affine))

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        linears = (self.query, self.key, self.value, self.rate, self.decay, self.last)
        weights = sum(linear.weight.numel() for linear in linears)
        state = self.heads * self.key_width * self.value_width
        # of the state: what it holds at k, the update at k, and q's reading
        return 2 * part.rows(sizes) * (weights + 3 * state)


def unit(z_BTHF: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1, or shorter where they nearly vanish."""
    return z_BTHF * torch.rsqrt(z_BTHF.square().sum(-1, keepdim=True) + EPSILON)


class DeltaOptions(SequenceOptions):
    """Width rule: heads and widths of the guide's attention. Without one, or with options, `heads` heads that share
    `width` features; heads default to one per 32 of the part's width, 2 or more when bidirectional, and width to the
    part's.
    """

    heads: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    memory: tuple[PositiveFloat, PositiveFloat] = Field(
        default=MEMORY, description="tokens that the first and last head remember"
    )


def takes_guides_heads(part: PartFacts, options: DeltaOptions) -> bool:
    """Whether nothing was asked for, and the guide's heads can be shared out among the directions."""
    asked = options.heads is not None or options.width is not None
    return part.attention is not None and not asked and part.attention.heads >= directions(part, options)


def directions(part: PartFacts, options: DeltaOptions) -> int:
    return 2 if reads_both_ways(part, options) else 1


def head_shape(part: PartFacts, options: DeltaOptions) -> tuple[int, int, int]:
    """heads, key_width, value_width."""
    facts = part.attention
    if facts is not None and takes_guides_heads(part, options):
        return facts.heads, facts.query.weight_OI.shape[0] // facts.heads, facts.value.weight_OI.shape[0] // facts.heads
    width = options.width or part.features_width
    fewest = max(directions(part, options), facts.heads if facts is not None else 1)
    heads = options.heads or fitting_heads(width, fewest)
    return heads, width // heads, width // heads


def fitting_heads(width: int, fewest: int) -> int:
    """One head per 32 features or `fewest`, more where that doesn't divide the width."""
    heads = max(fewest, default_heads(width))
    while heads < width and width % heads:
        heads += 1
    return heads


def check(part: PartFacts, options: DeltaOptions) -> None:
    check_sequence("delta", part)
    if takes_guides_heads(part, options):
        return
    width = options.width or part.features_width
    heads, *_ = head_shape(part, options)
    if width % heads or heads < directions(part, options):
        mixing = "causal" if options.causal else part.mixing
        found = f"width {width} with {heads} heads for {describe(part.input_shape)}, a {mixing} part"
        raise part.mismatch(
            "delta",
            found=found if heads > 1 else found.replace("heads", "head"),
            expected="a width that the heads divide, and a head for each direction",
            advice=f"Set heads={fitting_heads(width, directions(part, options))}, or another width.",
        )


def build(part: PartFacts, options: DeltaOptions) -> Delta:
    heads, key_width, value_width = head_shape(part, options)
    return Delta(
        heads=heads,
        key_width=key_width,
        value_width=value_width,
        memory=later(options.memory, steps_ahead(part, options)),
        **sequence_frame(part, options),
    )


TARGET = Family(
    name="delta",
    summary="gated delta rule on the guide's own q, k, v and o; overwrites what it holds at a key",
    options=DeltaOptions,
    module=Delta,
    build=build,
    scope="mixing",
    check=check,
)
