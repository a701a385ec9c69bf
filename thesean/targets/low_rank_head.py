"""A token-wise linear map through fewer numbers: a language model's head, which is a third of a small one's step.

B batch, T time, D width of the part, R rank, V outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from thesean.errors import NumericalError
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.module import State, TargetModule
from thesean.targets.shared.sequence import SmallLinear, check_sequence

# Of the largest variance: what inputs do less than this is rounding.
_NOTHING = 1e-10


class LowRankHeadOptions(Options):
    """R = `rank`, or half of the narrower of the part's widths."""

    rank: int | None = Field(default=None, gt=0, description="numbers between; half of the narrower width")


class LowRankHead(TargetModule):
    """y = last(down(x)). x_BTD -> y_BTV, token by token. R (D + V) products instead of D V."""

    family = "low-rank-head"

    def __init__(self, *, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank)
        self.last = SmallLinear(rank, width_out)

    def config(self) -> dict[str, Any]:
        return {
            "width_in": self.down.in_features,
            "width_out": self.last.out_features,
            "rank": self.down.out_features,
        }

    def features(self, x: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        return self.down(x), None

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The map of this rank that is nearest to the guide's on its activations (reduced-rank regression: Izenman
        1975): with S the spread of x and K that of y with x, K S^-1/2 cut to its first singular vectors. At full rank
        a linear guide is met whole. Raises NumericalError where the activations are not finite.
        """
        if not examples:
            return
        start_DV = torch.cat([examples[0][0], examples[0][1]], -1).flatten(0, -2).double().mean(0)
        total, width = torch.zeros_like(start_DV[:1]), self.down.in_features
        sum_E, sums_ED = torch.zeros_like(start_DV), torch.zeros(len(start_DV), width).to(start_DV)
        for x_BTD, y_BTV in examples:
            both_NE = torch.cat([x_BTD, y_BTV], -1).flatten(0, -2).double() - start_DV  # or a large mean cancels
            total, sum_E = total + len(both_NE), sum_E + both_NE.sum(0)
            sums_ED.addmm_(both_NE.mT, both_NE[:, :width])
        if not bool(sums_ED.isfinite().all()):
            raise NumericalError(
                f"{part.path}: can't solve a rank, activations are not finite. Look for NaN in the data."
            )
        mean_E = sum_E / total
        spread_DD, cross_VD = (sums_ED / total - torch.outer(mean_E, mean_E[:width])).split(
            [width, len(mean_E) - width]
        )
        values_D, vectors_DD = torch.linalg.eigh(spread_DD)
        seen_D = values_D > _NOTHING * values_D.max()
        inverse_DD = (vectors_DD[:, seen_D] / values_D[seen_D].sqrt()) @ vectors_DD[:, seen_D].mT
        white_VD = cross_VD @ inverse_DD
        first_DR = torch.linalg.eigh(white_VD.mT @ white_VD).eigenvectors[:, -self.down.out_features :]
        mean_D, mean_V = (start_DV + mean_E).split([width, len(mean_E) - width])
        down_RD = first_DR.mT @ inverse_DD
        self.down.weight.copy_(down_RD)
        self.down.bias.copy_(-down_RD @ mean_D)
        self.last.weight.copy_(white_VD @ first_DR)
        self.last.bias.copy_(mean_V)


def check(part: PartFacts, options: LowRankHeadOptions) -> None:
    """Raises TargetMismatchError unless the part is token-wise and no narrower than the rank."""
    check_sequence("low-rank-head", part)
    if part.mixing != "none":
        raise part.mismatch(
            "low-rank-head",
            found="one that mixes steps",
            expected="a token-wise map, such as a language model's head",
            advice=f"Keep it with {part.keep}.",
        )
    most = min(part.width_in, part.width_out)
    if options.rank is not None and options.rank > most:
        raise part.mismatch(
            "low-rank-head",
            found=f"rank={options.rank}",
            expected=f"at most {most}, the narrower of its widths",
            advice=f"Set rank={most} or less.",
        )


def build(part: PartFacts, options: LowRankHeadOptions) -> LowRankHead:
    rank = options.rank or max(1, min(part.width_in, part.width_out) // 2)
    return LowRankHead(width_in=part.width_in, width_out=part.width_out, rank=rank)


TARGET = Family(
    name="low-rank-head",
    summary="a token-wise linear map, such as a language model's head, through fewer numbers",
    options=LowRankHeadOptions,
    module=LowRankHead,
    build=build,
    scope="part",
    check=check,
)
