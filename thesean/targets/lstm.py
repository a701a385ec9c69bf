"""Long short-term memory.

B batch, T time, D width of the part, E units per direction, S = 2E the hidden and the cell state side by side
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.lookahead import Late, read_later
from thesean.targets.shared.sequence import WidthOptions, check_sequence, sequence_frame
from thesean.targets.shared.steps import Steps
from thesean.targets.shared.torch_cell import (
    CellTarget,
    orthogonal_recurrence,
    run_cell,
    spread_memories,
)


class LSTM(CellTarget):
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t), y_t = last(h_t) (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    x_BTD, state_BS -> (y_BTD, state_BS).
    """

    family = "lstm"
    cell = nn.LSTM

    @torch.no_grad()
    def reset_core(self) -> None:
        orthogonal_recurrence(self.core, 1.0)
        spread_memories(self.core)

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], 2 * self.width)

    def mix(
        self, x_BTD: torch.Tensor, state: torch.Tensor | None, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if state is None:
            return run_cell(self.core, x_BTD, None, steps)[0], None
        hidden_BE, cell_BE = state.split(self.width, -1)
        # contiguous: cuDNN refuses views
        start = (hidden_BE.unsqueeze(0).contiguous(), cell_BE.unsqueeze(0).contiguous())
        features_BTE, last = run_cell(self.core, x_BTD, start, steps)
        return read_later(self.later, features_BTE, late), torch.cat(last, -1).squeeze(0)


def build(part: PartFacts, options: WidthOptions) -> LSTM:
    return LSTM(width=options.features_width(part), **sequence_frame(part, options))


TARGET = Family(
    name="lstm",
    summary="long short-term memory (nn.LSTM), memories spread from 1 to 50 steps",
    options=WidthOptions,
    module=LSTM,
    build=build,
    scope="mixing",
    check=lambda part, options: check_sequence("lstm", part),
)
