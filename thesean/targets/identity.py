"""Drop a part: the residual stream passes by.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.module import TargetModule


class Identity(TargetModule):
    """y = x. It stands where the part was in the stream: a branch's sum goes with the branch."""

    family = "identity"

    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, x: torch.Tensor, state: Any = None) -> torch.Tensor:
        return x

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        return 0


def check(part: PartFacts, options: Options) -> None:
    if part.input_shape != part.output_shape:
        raise part.mismatch(
            "identity",
            found=f"{part.input_shape} -> {part.output_shape}",
            expected="a part that keeps the shape",
            advice=f"Choose target 'linear', or keep it with {part.keep}.",
        )


TARGET = Family(
    name="identity",
    summary="drops the part: the residual stream passes by",
    options=Options,
    module=Identity,
    build=lambda part, options: Identity(),
    scope="part",
    check=check,
    removes=True,
)
