"""The frame around torch's own recurrent cells (nn.RNN, nn.GRU, nn.LSTM): one layer, one or two directions.

B batch, T time, D width of the part, E units per direction
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from thesean.targets.shared.lookahead import InPlace, Late, LaterSteps, read_later
from thesean.targets.shared.sequence import SequenceFrame, SequenceTarget, SmallLinear
from thesean.targets.shared.steps import Steps


class CellTarget(SequenceTarget):
    """last(cell(x)). A subclass names its cell and spreads its initial weights."""

    saved = ("width",)
    reads_mask = True
    looks_ahead = True
    cell: type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]

    def __init__(
        self,
        *,
        width: int,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        self.width = width
        self.core = self.cell(self.width_in, width, batch_first=True, bidirectional=self.bidirectional)
        self.later = LaterSteps(width, self.lookahead) if self.lookahead else None
        self.last = SmallLinear(self.directions * width, self.width_out)
        self.reset_core()

    @torch.no_grad()
    def reset_core(self) -> None:
        """Set the core's initial weights."""
        raise NotImplementedError(f"{type(self).__name__}.reset_core")

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.width)

    def mix(
        self, x_BTD: torch.Tensor, state: torch.Tensor | None, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # torch wants the layers first: (1, B, E)
        features_BTE, last_1BE = run_cell(self.core, x_BTD, None if state is None else state.unsqueeze(0), steps)
        return read_later(self.later, features_BTE, late), None if state is None else last_1BE.squeeze(0)

    @property
    def late_width(self) -> int:
        return self.width


def run_cell(
    cell: nn.RNN | nn.GRU | nn.LSTM, x_BTD: torch.Tensor, start: Any, steps: Steps | None
) -> tuple[torch.Tensor, Any]:
    """The cell's outputs and last state, each row read up to its last token; what a cell was lowered to takes the
    lengths as they are.
    """
    if steps is None:
        return cell(x_BTD, start)
    if isinstance(steps, InPlace):
        before_1BE = start[0] if isinstance(start, tuple) else start
        return steps.over_tokens(lambda x, steps: _run_rows(cell, x, start, steps), x_BTD, before_1BE.squeeze(0))
    return _run_rows(cell, x_BTD, start, steps)


def _run_rows(
    cell: nn.RNN | nn.GRU | nn.LSTM, x_BTD: torch.Tensor, start: Any, steps: Steps | None
) -> tuple[torch.Tensor, Any]:
    """Tokens first."""
    if steps is None or x_BTD.is_meta:  # no numbers, no lengths to pack by: shapes are those of whole rows
        return cell(x_BTD, start)
    if not isinstance(cell, nn.RNNBase):
        return cell(x_BTD, start, steps.count_B)
    lengths_B = steps.count_B.clamp_min(1)  # torch packs no empty row
    packed = pack_padded_sequence(x_BTD, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
    packed, last = cell(packed, start)
    features_BTE, _ = pad_packed_sequence(packed, batch_first=True, total_length=x_BTD.shape[1])
    if start is None:
        return features_BTE, last
    empty_1B1 = (steps.count_B == 0).view(1, -1, 1)
    if isinstance(last, tuple):
        return features_BTE, tuple(torch.where(empty_1B1, old, new) for old, new in zip(start, last, strict=True))
    return features_BTE, torch.where(empty_1B1, start, last)


def spread_memories(core: nn.RNNBase) -> None:
    """Biases of the second gate (a GRU's z, an LSTM's f) that give the units memories of 1 to about 50 steps, so that
    none has to be learnt by backpropagation through time first.
    """
    for name, bias in core.named_parameters():
        if name.startswith("bias_hh"):
            bias[core.hidden_size : 2 * core.hidden_size] = torch.linspace(-1, 4, core.hidden_size)


def orthogonal_recurrence(core: nn.RNNBase, gain: float) -> None:
    """Each gate's recurrent matrix orthogonal times `gain`, for all directions (Saxe et al. 2014)."""
    for name, weight in core.named_parameters():
        if name.startswith("weight_hh"):
            for gate in weight.split(core.hidden_size):
                nn.init.orthogonal_(gate, gain)
