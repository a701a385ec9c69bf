"""A causal depthwise convolution that carries the last inputs: y_t = b + sum_j w_j x_{t-W+1+j}.

B batch, T time, E channels, W taps of a channel, R = W - 1 inputs that the next step still reads
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F


def causal_convolution(
    x_BTE: torch.Tensor,
    weight_EW: torch.Tensor,
    bias_E: torch.Tensor,
    window_BRE: torch.Tensor,
    *,
    activation: Literal["none", "silu"] = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's own filter over its last W inputs, the newest under the last tap, and the window after it.

    x_BTE, weight_EW, bias_E, window_BRE (zeros at a sequence's start) -> y_BTE, window_BRE. T steps at once equal T
    single steps. `activation` is of y alone. Raises ValueError for shapes that do not fit.
    """
    batch, time, channels = x_BTE.shape
    taps = weight_EW.shape[1]
    if weight_EW.shape[0] != channels or bias_E.shape != (channels,) or window_BRE.shape != (batch, taps - 1, channels):
        raise ValueError(
            f"causal_convolution: expected x (B, T, E), weight (E, W), bias (E,) and window (B, W - 1, E), found x "
            f"{tuple(x_BTE.shape)}, weight {tuple(weight_EW.shape)}, bias {tuple(bias_E.shape)}, window "
            f"{tuple(window_BRE.shape)}."
        )
    seen = torch.cat([window_BRE, x_BTE], dim=1)
    # on the CPU as fast as torch's grouped convolution, which wants the channels first, and faster for a single step
    y_BTE = bias_E + sum(weight_EW[:, tap] * seen[:, tap : tap + time] for tap in range(taps))
    return F.silu(y_BTE) if activation == "silu" else y_BTE, seen[:, time:]
