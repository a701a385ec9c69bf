"""The modules that stand in for delta rules, state spaces and reservoirs while exporting.

B batch, T time, H heads, F features of a key, K width of a value, E channels or units, N states of a channel,
P channels of a head or units of a block, G blocks, W taps, R = W - 1
"""

from __future__ import annotations

import torch
from torch import nn
from torch._higher_order_ops import scan  # the operator that the exporter turns into ONNX Scan; no public name yet

from thesean.deploy.lowering.cells import linear_attention_operator, require_exporting


class LoweredDeltaRule(nn.Module):
    """DeltaRuleCore as com.microsoft::LinearAttention with the update rule "gated_delta"."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self,
        query_BTHF: torch.Tensor,
        key_BTHF: torch.Tensor,
        value_BTHK: torch.Tensor,
        beta_BTH: torch.Tensor,
        log_decay_BTH: torch.Tensor,
        state_BHFK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_exporting(self.path)
        return linear_attention_operator(query_BTHF, key_BTHF, value_BTHK, log_decay_BTH, beta_BTH, state_BHFK)


class LoweredDiagonalScan(nn.Module):
    """DiagonalScanCore as com.microsoft::LinearAttention, whose decay may be one a feature.

    Measured in onnxruntime 1.32 (128 channels of 16 states, 512 steps, one thread): 0.95 ms with 4 heads of 32
    channels, 8 to 12 ms with a head for each channel, and 2.1 ms for an elementwise Scan over the 2048 states, which
    leaves the exponentials, the products with B and C and the sums over states to be computed beside it.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self,
        query_BTHN: torch.Tensor,
        key_BTHN: torch.Tensor,
        value_BTHP: torch.Tensor,
        log_decay_BTHN: torch.Tensor,
        state_BHNP: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_exporting(self.path)
        return linear_attention_operator(query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN, None, state_BHNP)


class LoweredCausalConvolution(nn.Module):
    """CausalConvolutionCore as com.microsoft::CausalConvWithState, activation included.

    Measured in onnxruntime 1.32 (128 channels, one thread): 13 us a step against 30 us for Concat, Conv, Sigmoid, Mul
    and Slice; over 512 steps it is slower, 0.74 ms against 0.17 ms.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self, x_BTE: torch.Tensor, weight_EW: torch.Tensor, bias_E: torch.Tensor, window_BRE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_exporting(self.path)
        y_BTE, window_BRE = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::CausalConvWithState",
            (x_BTE, weight_EW.unsqueeze(1), bias_E, window_BRE),
            {"activation": "silu", "channels_last": 1},
            dtypes=[x_BTE.dtype] * 2,
            shapes=[list(x_BTE.shape), list(window_BRE.shape)],
            version=1,
        )
        return y_BTE, window_BRE


class LoweredLeakyRecurrence(nn.Module):
    """LeakyRecurrence as ONNX Scan, its blocks one batched product.

    The RNN operator has no leak; a GRU with constant gates has one and takes 8 times as long, for it computes the gates
    (512 units, 512 steps, one thread, onnxruntime 1.32: 33 ms against 4.4 ms in blocks of 64).
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(
        self, drive_BTE: torch.Tensor, recurrent_GPP: torch.Tensor, leak_E: torch.Tensor, state_BE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require_exporting(self.path)
        blocks, size, _ = recurrent_GPP.shape
        read_GPP = recurrent_GPP.mT

        def step(hidden_BE: torch.Tensor, drive_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            read_BG1P = hidden_BE.unflatten(-1, (blocks, 1, size)) @ read_GPP
            heard_BE = torch.tanh(drive_BE + read_BG1P.flatten(-3))
            hidden_BE = hidden_BE + leak_E * (heard_BE - hidden_BE)
            return hidden_BE, hidden_BE.clone()  # scan forbids outputs that share memory

        last_BE, hidden_TBE = scan(step, state_BE, drive_BTE.transpose(0, 1))
        return hidden_TBE.transpose(0, 1), last_BE
