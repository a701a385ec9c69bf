"""The Elman network: the plain tanh recurrence, the paper's own recurrent target.

B batch, T time, D width of the part, E units per direction
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.sequence import WidthOptions, check_sequence, sequence_frame
from thesean.targets.shared.torch_cell import CellTarget, orthogonal_recurrence


class Elman(CellTarget):
    """h_t = tanh(W x_t + R h_{t-1} + b), y_t = last(h_t) (Elman 1990). x_BTD, state_BE -> (y_BTD, state_BE)."""

    family = "elman"
    cell = nn.RNN

    @torch.no_grad()
    def reset_core(self) -> None:
        # a little under 1: orthogonal keeps the past, 0.95 lets tanh forget it before it saturates
        orthogonal_recurrence(self.core, 0.95)


def build(part: PartFacts, options: WidthOptions) -> Elman:
    return Elman(width=options.features_width(part), **sequence_frame(part, options))


TARGET = Family(
    name="elman",
    summary="plain tanh recurrence (nn.RNN); smallest, forgets soonest",
    options=WidthOptions,
    module=Elman,
    build=build,
    scope="mixing",
    check=lambda part, options: check_sequence("elman", part),
)
