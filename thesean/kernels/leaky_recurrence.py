"""Leaky tanh units: h_t = (1 - a) h_{t-1} + a tanh(R h_{t-1} + drive_t), with R block-diagonal.

B batch, T time, E units, G blocks, P units of a block
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import full_precision, widen


def leaky_recurrence(
    drive_BTE: torch.Tensor, recurrent_GPP: torch.Tensor, leak_E: torch.Tensor, state_BE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All hidden states of leaky integrator units, and the last one (Jaeger et al. 2007, eq. 5 with a unit step).

    drive_BTE, recurrent_GPP (row i of a block is what its unit i reads), leak_E in (0, 1], state_BE -> hidden_BTE,
    last_BE. T steps at once equal T single steps. Half-precision inputs are computed in float32: `hidden_BTE` has the
    drive's dtype, `last_BE` stays wide. Raises ValueError for shapes that do not fit or T = 0.
    """
    batch, time, units = drive_BTE.shape
    blocks, size, _ = recurrent_GPP.shape
    if (
        blocks * size != units
        or recurrent_GPP.shape[2] != size
        or leak_E.shape != (units,)
        or state_BE.shape != (batch, units)
        or time == 0
    ):
        raise ValueError(
            f"leaky_recurrence: expected drive (B, T, E) with T >= 1, recurrent (G, P, P) with G P = E, leak (E,) and "
            f"state (B, E), found drive {tuple(drive_BTE.shape)}, recurrent {tuple(recurrent_GPP.shape)}, leak "
            f"{tuple(leak_E.shape)}, state {tuple(state_BE.shape)}."
        )
    drive, recurrent_GPP, leak, state = widen(drive_BTE, recurrent_GPP, leak_E, state_BE)
    leak_G1P = leak.view(blocks, 1, size)
    hidden_GBP = state.view(batch, blocks, size).transpose(0, 1)
    steps = []
    with full_precision(drive.device):
        # blocks in front for the batched product; unbind once: slicing in the loop is two orders of magnitude slower
        for drive_GBP in drive.view(batch, time, blocks, size).permute(1, 2, 0, 3).unbind(0):
            hidden_GBP = torch.lerp(hidden_GBP, torch.baddbmm(drive_GBP, hidden_GBP, recurrent_GPP.mT).tanh(), leak_G1P)
            steps.append(hidden_GBP)
    hidden_BTE = torch.stack(steps, dim=0).permute(2, 0, 1, 3).reshape(batch, time, units)
    return hidden_BTE.to(drive_BTE.dtype), hidden_GBP.transpose(0, 1).reshape(batch, units)
