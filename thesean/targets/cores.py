"""The parameter-free hearts of the recurrent targets: modules of their own, so that lowering can swap them by type.

B batch, T time, D width, H heads, F features of a key, K width of a value
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.kernels.linear_attention import linear_attention
from thesean.kernels.linear_recurrence import linear_recurrence


class LinearRecurrence(nn.Module):
    """h_t = decay_t * h_{t-1} + input_t, elementwise (Martin and Cundy 2018).

    decay_BTD, input_BTD, state_BD -> (hidden_BTD, last_BD).
    """

    def forward(
        self, decay_BTD: torch.Tensor, input_BTD: torch.Tensor, state_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_recurrence(decay_BTD, input_BTD, state_BD)


class LinearAttentionCore(nn.Module):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and y_t = q_t S_t, per head (Yang et al. 2024; g = 0 when None).

    query_BTHF, key_BTHF, value_BTHK, log_decay_BTH, state_BHFK -> (out_BTHK, state_BHFK).
    """

    def forward(
        self,
        query_BTHF: torch.Tensor,
        key_BTHF: torch.Tensor,
        value_BTHK: torch.Tensor,
        log_decay_BTH: torch.Tensor | None,
        state_BHFK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_attention(query_BTHF, key_BTHF, value_BTHK, log_decay_BTH, state_BHFK)
