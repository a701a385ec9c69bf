"""Gated linear attention that takes over the guide's query, key, value and output projections.

B batch, T time, D width of the part, H heads, C width of a head's query and key, F = 2C features, K width of a value
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from thesean.kernels.linear_attention import full_linear_attention
from thesean.targets.base import Affine, Family, PartFacts
from thesean.targets.cores import LinearAttentionCore
from thesean.targets.sequence import (
    SequenceOptions,
    SequenceTarget,
    check_sequence,
    describe,
    sequence_config,
    small_linear,
)

# Heads forget over 1/3 token to 64, spread geometrically, and W starts at 1.5 instead of 1. Solved in closed form on
# the demo's guide this beats heads that all remember 90 to 1100 tokens, with W = 1, by far: "fast linear-attention" and
# the same with long memories in benchmarks/results/recipes.json.
MEMORY = (1 / 3, 64.0)
SHARPNESS = 1.5

# guards the division where sharp features of a query meet none of the keys so far
EPSILON = 1e-6


class LinearAttention(SequenceTarget):
    """y = last(sum_s w_ts v_s / sum_s w_ts), w_ts = decay_{s..t} phi(q_t).phi(k_s), phi(x) = softmax([Wx, -Wx]).

    Feature map: Zhang et al. 2024 (Hedgehog), W learnt per head from the identity. Decay: Yang et al. 2024, one
    scalar a head. The sum of weights is carried as one more column of the values, all ones.
    x_BTD, state_BHFk -> (y_BTD, state_BHFk), k = K + 1. Bidirectional: s over all tokens, no decay, no state.
    """

    family = "linear-attention"

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        heads: int,
        key_width: int,
        value_width: int,
        bidirectional: bool = False,
        residual: bool = False,
        norm: bool = False,
        memory: tuple[float, float] = MEMORY,
        sharpness: float = SHARPNESS,
    ) -> None:
        super().__init__(
            width_in=width_in, width_out=width_out, bidirectional=bidirectional, residual=residual, norm=norm
        )
        self.memory = (float(memory[0]), float(memory[1]))
        self.sharpness = float(sharpness)
        self.heads = heads
        self.key_width = key_width
        self.value_width = value_width
        self.query = nn.Linear(width_in, heads * key_width)
        self.key = nn.Linear(width_in, heads * key_width)
        self.value = nn.Linear(width_in, heads * value_width)
        self.map_query_HCC = nn.Parameter(torch.eye(key_width).repeat(heads, 1, 1))
        self.map_key_HCC = nn.Parameter(torch.eye(key_width).repeat(heads, 1, 1))
        self.decay = None if bidirectional else nn.Linear(width_in, heads)
        self.core = LinearAttentionCore()
        self.last = small_linear(heads * value_width, width_out)
        self.reset_projections()

    @torch.no_grad()
    def reset_projections(self) -> None:
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=self.width_in**-0.5)
            nn.init.zeros_(linear.bias)
        if self.decay is not None:
            # the same for every token until training says else
            nn.init.zeros_(self.decay.weight)
            shortest, longest = self.memory
            tokens_H = torch.logspace(math.log10(shortest), math.log10(longest), self.heads)
            self.decay.bias.copy_(torch.log(torch.expm1(1 / tokens_H)))  # softplus of it is 1 / tokens

    def config(self) -> dict[str, Any]:
        return {
            **super().config(),
            "heads": self.heads,
            "key_width": self.key_width,
            "value_width": self.value_width,
            "memory": list(self.memory),
            "sharpness": self.sharpness,
        }

    def initial_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.heads, 2 * self.key_width, self.value_width + 1)

    def phi(self, x_BTD: torch.Tensor, linear: nn.Linear, map_HCC: torch.Tensor) -> torch.Tensor:
        """softmax([Wx, -Wx]) per head, (B, T, H, F)."""
        # W is folded into the projection: one small product of weights instead of one a token, and a constant in ONNX
        weight_HCD = map_HCC @ linear.weight.unflatten(0, (self.heads, self.key_width))
        bias_HC = (map_HCC @ linear.bias.view(self.heads, self.key_width, 1)).squeeze(-1)
        projected = F.linear(x_BTD, weight_HCD.flatten(0, 1), bias_HC.flatten())
        projected_BTHC = projected.unflatten(-1, (self.heads, self.key_width))
        return torch.cat([projected_BTHC, -projected_BTHC], -1).softmax(-1)

    def mix(self, x_BTD: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_BTHF = self.phi(x_BTD, self.query, self.map_query_HCC)
        key_BTHF = self.phi(x_BTD, self.key, self.map_key_HCC)
        value_BTHk = F.pad(self.value(x_BTD).unflatten(-1, (self.heads, self.value_width)), (0, 1), value=1.0)
        if self.decay is None or state is None:
            out_BTHk = full_linear_attention(query_BTHF, key_BTHF, value_BTHk)
        else:
            log_decay_BTH = -F.softplus(self.decay(x_BTD))
            out_BTHk, state = self.core(query_BTHF, key_BTHF, value_BTHk, log_decay_BTH, state)
        mean_BTHK = out_BTHk[..., :-1] / (out_BTHk[..., -1:] + EPSILON)
        return mean_BTHK.flatten(-2), state

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Query, key, value and output projections, each where its shape fits (all, unless options changed widths)."""
        facts = part.attention
        if facts is None or facts.heads != self.heads:
            return ()
        copied = []
        pairs = ((self.query, facts.query), (self.key, facts.key), (self.value, facts.value), (self.last, facts.output))
        for name, (linear, affine) in zip(("query", "key", "value", "output"), pairs, strict=True):
            if copy_affine(linear, affine):
                copied.append(name)
        if "query" in copied and "key" in copied:
            # phi knows no scale: a guide that divides q.k by something else than sqrt(C) gets the rest in both maps
            gain = self.sharpness * (facts.scale * self.key_width**0.5) ** 0.5
            eye_CC = torch.eye(self.key_width, device=self.map_query_HCC.device)
            self.map_query_HCC.copy_(gain * eye_CC)
            self.map_key_HCC.copy_(gain * eye_CC)
        return tuple(copied)

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        tokens = 1
        for dim in part.input_shape[:-1]:
            tokens *= sizes[dim] if isinstance(dim, str) else dim
        linears = (self.query, self.key, self.value, self.last, *((self.decay,) if self.decay is not None else ()))
        weights = sum(linear.weight.numel() for linear in linears)
        state = self.heads * 2 * self.key_width * (self.value_width + 1)
        return 2 * tokens * (weights + 2 * state)  # k v^T into the state, q out of it


@torch.no_grad()
def copy_affine(linear: nn.Linear, affine: Affine) -> bool:
    """Copy where the shapes agree; tells whether they did."""
    if linear.weight.shape != affine.weight_OI.shape:
        return False
    linear.weight.copy_(affine.weight_OI)
    linear.bias.copy_(affine.bias_O)
    return True


class LinearAttentionOptions(SequenceOptions):
    """Width rule: heads and widths of the guide's attention. Without one, or with options, `heads` heads that share
    `width` features; heads default to one per 32 of the part's width, and width to the part's input width.
    """

    heads: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    memory: tuple[float, float] = Field(default=MEMORY, description="tokens that the first and last head remember")
    sharpness: float = Field(default=SHARPNESS, gt=0, description="of copied queries and keys, as a factor on W")


def head_shape(part: PartFacts, options: LinearAttentionOptions) -> tuple[int, int, int]:
    """heads, key_width, value_width."""
    facts = part.attention
    asked = options.heads is not None or options.width is not None
    if facts is not None and not asked:
        return facts.heads, facts.query.weight_OI.shape[0] // facts.heads, facts.value.weight_OI.shape[0] // facts.heads
    width = options.width or part.width_in
    heads = options.heads or (facts.heads if facts is not None else default_heads(width))
    return heads, width // heads, width // heads


def default_heads(width: int) -> int:
    """One head per 32 features, fewer where that doesn't divide the width."""
    heads = max(1, width // 32)
    while width % heads:
        heads -= 1
    return heads


def check(part: PartFacts, options: LinearAttentionOptions) -> None:
    check_sequence("linear-attention", part)
    width = options.width or part.width_in
    heads, *_ = head_shape(part, options)
    if (options.heads is not None or options.width is not None) and width % heads:
        raise part.mismatch(
            "linear-attention",
            found=f"width {width} with {heads} heads for {describe(part.input_shape)}",
            expected="a width that the heads divide",
            advice=f"Set heads={default_heads(width)}, or another width.",
        )


def build(part: PartFacts, options: LinearAttentionOptions) -> LinearAttention:
    heads, key_width, value_width = head_shape(part, options)
    return LinearAttention(
        heads=heads,
        key_width=key_width,
        value_width=value_width,
        memory=options.memory,
        sharpness=options.sharpness,
        **sequence_config(part, options),
    )


TARGET = Family(
    name="linear-attention",
    summary="gated, normalised linear attention on the guide's own q, k, v and o",
    options=LinearAttentionOptions,
    module=LinearAttention,
    build=build,
    scope="mixing",
    check=check,
)
