"""The parameter-free hearts of the recurrent targets: modules of their own, so that lowering can swap them by type.

B batch, T time, D width, H heads of queries, G heads of keys and values, F features of a key, K width of a value,
E units or channels, N states of a channel, P channels of a head or units of a block, Q blocks, W taps, R = W - 1
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from thesean.kernels.causal_convolution import causal_convolution
from thesean.kernels.delta_rule import delta_rule
from thesean.kernels.diagonal_scan import diagonal_scan
from thesean.kernels.leaky_recurrence import leaky_recurrence
from thesean.kernels.linear_attention import linear_attention
from thesean.kernels.linear_recurrence import linear_recurrence
from thesean.kernels.window_attention import window_attention


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

    query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, state_BGFK -> (out_BTHK, state_BGFK); H / G queries read one state.
    """

    def forward(
        self,
        query_BTHF: torch.Tensor,
        key_BTGF: torch.Tensor,
        value_BTGK: torch.Tensor,
        log_decay_BTG: torch.Tensor | None,
        state_BGFK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_attention(query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, state_BGFK)


class DeltaRuleCore(nn.Module):
    """S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T and y_t = q_t S_t, per head (Yang et al. 2024).

    query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH, state_BHFK -> (out_BTHK, state_BHFK).
    """

    def forward(
        self,
        query_BTHF: torch.Tensor,
        key_BTHF: torch.Tensor,
        value_BTHK: torch.Tensor,
        beta_BTH: torch.Tensor,
        log_decay_BTH: torch.Tensor,
        state_BHFK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return delta_rule(query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH, state_BHFK)


class DiagonalScanCore(nn.Module):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and y_t = q_t S_t, one decay a state (Gu and Dao 2023).

    query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN, state_BHNP -> (out_BTHP, state_BHNP).
    """

    def forward(
        self,
        query_BTHN: torch.Tensor,
        key_BTHN: torch.Tensor,
        value_BTHP: torch.Tensor,
        log_decay_BTHN: torch.Tensor,
        state_BHNP: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return diagonal_scan(query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN, state_BHNP)


class CausalConvolutionCore(nn.Module):
    """silu(b + sum_j w_j x_{t-W+1+j}), per channel. x_BTE, weight_EW, bias_E, window_BRE -> (y_BTE, window_BRE)."""

    def forward(
        self, x_BTE: torch.Tensor, weight_EW: torch.Tensor, bias_E: torch.Tensor, window_BRE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y_BTE, window_BRE = causal_convolution(x_BTE, weight_EW, bias_E, window_BRE)
        return F.silu(y_BTE), window_BRE


class LeakyRecurrence(nn.Module):
    """h_t = (1 - a) h_{t-1} + a tanh(R h_{t-1} + drive_t), R block-diagonal (Jaeger et al. 2007).

    drive_BTE, recurrent_QPP, leak_E, state_BE -> (hidden_BTE, last_BE).
    """

    def forward(
        self, drive_BTE: torch.Tensor, recurrent_QPP: torch.Tensor, leak_E: torch.Tensor, state_BE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return leaky_recurrence(drive_BTE, recurrent_QPP, leak_E, state_BE)


class WindowAttentionCore(nn.Module):
    """Softmax attention over the last W = S - T tokens and what older ones sum to, as one mean: `window_attention`.

    query_BTHC (scaled), key_BSGC, value_BSGk, older_BTHk, gate_H -> mean_BTHK, K = k - 1.
    """

    def forward(
        self,
        query_BTHC: torch.Tensor,
        key_BSGC: torch.Tensor,
        value_BSGk: torch.Tensor,
        older_BTHk: torch.Tensor,
        gate_H: torch.Tensor,
    ) -> torch.Tensor:
        return window_attention(query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate_H)
