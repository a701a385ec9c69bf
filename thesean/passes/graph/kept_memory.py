"""The module that stands in a graph for a guide's own gated delta rule that carries its memory on.

B batch, T time, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.targets.shared.core import Core


class KeptMemory(nn.Module):
    """query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH, (state_BHFK) -> out_BTHK, state_BHFK after the last
    step. It starts as zeros.
    """

    stateful = True
    reads = 5

    def __init__(self) -> None:
        super().__init__()
        self.core = Core("delta_rule")

    def forward(
        self,
        query_BTHF: torch.Tensor,
        key_BTHF: torch.Tensor,
        value_BTHK: torch.Tensor,
        beta_BTH: torch.Tensor,
        log_decay_BTH: torch.Tensor,
        state_BHFK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if state_BHFK is None:
            widths = (query_BTHF.shape[3], value_BTHK.shape[3])
            state_BHFK = value_BTHK.new_zeros(value_BTHK.shape[0], value_BTHK.shape[2], *widths)
        out_BTHK, state_BHFK = self.core(query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH, state_BHFK)
        return out_BTHK, state_BHFK
