"""A perceptron on each token that also hears of the others, through their mean or a mixer.

B batch, T time, D width of the part, E hidden width
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.activations import ACTIVATIONS
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.module import State
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceTarget,
    SmallLinear,
    check_sequence,
    describe,
)
from thesean.targets.shared.steps import Steps, hide

OfOthers = Literal["mean", "mixer"]
Activation = Literal["gelu", "relu"]


class TokenMLP(SequenceTarget):
    """y_t = last([x_t, act(A x_t + C c_t + b)]), the same for every token. x_BTD -> y_BTD. Stateless: returns y alone.

    c is what a token hears of the others: the mean of all tokens, for sequences of any length, or W2 gelu(W1 x) with W1
    and W2 over time (Tolstikhin et al. 2021, eq. 1), for `length` of them. `last` reads x as well, so that the closed
    form solves for all that is linear in it.
    """

    family = "token-mlp"
    reads_mask = True
    saved = ("width", "mixing", "activation", "length")

    def __init__(
        self,
        *,
        width: int,
        mixing: OfOthers = "mean",
        activation: Activation = "gelu",
        length: int | None = None,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        """`length` is a mixer's. Raises ValueError for a mixer without one."""
        super().__init__(**frame)
        self.stateful = False
        self.width, self.mixing, self.activation, self.length = width, mixing, activation, length
        self.own = nn.Linear(self.width_in, width)
        self.others = nn.Linear(self.width_in, width, bias=False)
        self.over_time: nn.ModuleList | None = None
        if mixing == "mixer":
            if length is None:
                raise ValueError("expected the length of a mixer's sequences, found none")
            self.over_time = nn.ModuleList(nn.Linear(length, length) for _ in range(2))
        self.last = SmallLinear(self.width_in + width, self.width_out)
        self.reset_layers()

    @torch.no_grad()
    def reset_layers(self) -> None:
        for linear in (self.own, self.others, *(self.over_time or ())):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def mix(self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None) -> tuple[torch.Tensor, State | None]:
        hidden_BTE = self.own(x_BTD) + self.others(self._of_others(hide(x_BTD, steps), steps))
        return torch.cat([x_BTD, ACTIVATIONS[self.activation](hidden_BTE)], -1), None

    def _of_others(self, x_BTD: torch.Tensor, steps: Steps | None) -> torch.Tensor:
        """(B, 1, D), the mean of what is seen, or (B, T, D)."""
        if self.over_time is None:
            if steps is None:
                return x_BTD.mean(1, keepdim=True)
            return x_BTD.sum(1, keepdim=True) / steps.count_B.clamp_min(1).view(-1, 1, 1)
        first, second = self.over_time
        mixed_BTD: torch.Tensor = second(F.gelu(first(x_BTD.mT))).mT
        return mixed_BTD

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        a_token = self.own.weight.numel() + self.last.weight.numel()
        if self.over_time is None:  # the mean is one vector a sequence
            return 2 * (part.rows(sizes) * a_token + part.rows(sizes, 1) * self.others.weight.numel())
        over_time = 2 * self.width_in * (self.length or 0)
        return 2 * part.rows(sizes) * (a_token + self.others.weight.numel() + over_time)


class TokenMLPOptions(Options):
    """Width rule: E = `width`, or twice the part's width: 7 D^2 parameters, where a transformer's block has 12.

    `residual` adds the input where the width stays, `norm` puts a LayerNorm in front; Target("mlp", tokens="each",
    mixing="mean") sets both in a part that no stream runs beside.
    """

    width: int | None = Field(default=None, gt=0)
    mixing: OfOthers = Field(default="mean", description="what a token hears of the others")
    activation: Activation = "gelu"
    residual: bool = False
    norm: bool = False


def check(part: PartFacts, options: TokenMLPOptions) -> None:
    check_sequence("token-mlp", part)
    if part.mixing != "bidirectional":
        seen = "no output sees a later token" if part.mixing == "causal" else "no output sees another token"
        raise part.mismatch(
            "token-mlp",
            found=f"a {'causal' if part.mixing == 'causal' else 'token-wise'} part: {seen}",
            expected="a part whose outputs may see all tokens",
            advice="Choose Target('mlp', tokens='each'), which sees each token alone"
            + (", or target 'rnn'." if part.mixing == "causal" else "."),
        )
    if options.mixing == "mixer" and isinstance(part.input_shape[1], str):
        raise part.mismatch(
            "token-mlp",
            found=f"{describe(part.input_shape)} -> {describe(part.output_shape)}, and mixing='mixer'",
            expected="a sequence of one fixed length for a mixer",
            advice="Set mixing='mean', which takes any length, or trace the guide with a fixed one.",
        )


def build(part: PartFacts, options: TokenMLPOptions) -> TokenMLP:
    return TokenMLP(
        width=options.width or 2 * part.features_width,
        mixing=options.mixing,
        activation=options.activation,
        length=int(part.input_shape[1]) if options.mixing == "mixer" else None,
        width_in=part.width_in,
        width_out=part.width_out,
        bidirectional=True,  # check
        residual=options.residual,
        norm=options.norm,
    )


TARGET = Family(
    name="token-mlp",
    summary="perceptron on each token that hears of the others through their mean or a mixer",
    options=TokenMLPOptions,
    module=TokenMLP,
    build=build,
    scope="part",
    check=check,
)
