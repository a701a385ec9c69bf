"""The gated recurrent unit.

B batch, T time, D width of the part, E units per direction
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.sequence import WidthOptions, check_sequence, sequence_frame
from thesean.targets.shared.torch_cell import CellTarget, orthogonal_recurrence, spread_memories


class GRU(CellTarget):
    """h_t = (1 - z) n + z h_{t-1} with gates r, z and candidate n, y_t = last(h_t) (Cho et al. 2014).

    x_BTD, state_BE -> (y_BTD, state_BE).
    """

    family = "gru"
    cell = nn.GRU

    @torch.no_grad()
    def reset_core(self) -> None:
        orthogonal_recurrence(self.core, 1.0)
        spread_memories(self.core)


def build(part: PartFacts, options: WidthOptions) -> GRU:
    return GRU(width=options.features_width(part), **sequence_frame(part, options))


TARGET = Family(
    name="gru",
    summary="gated recurrent unit (nn.GRU), memories spread from 1 to 50 steps",
    options=WidthOptions,
    module=GRU,
    build=build,
    scope="mixing",
    check=lambda part, options: check_sequence("gru", part),
)
