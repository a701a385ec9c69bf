"""Leaky tanh units as ONNX Scan, their blocks one batched product.

B batch, T time, E units, G blocks, P units of a block
"""

from __future__ import annotations

import torch
from torch._higher_order_ops import scan  # the operator that the exporter turns into ONNX Scan; no public name yet

from thesean.deploy.lowering.lowered import Lowered
from thesean.targets.shared.core import Core


def leaky_recurrence(
    drive_BTE: torch.Tensor, recurrent_GPP: torch.Tensor, leak_E: torch.Tensor, state_BE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The RNN operator has no leak; a GRU with constant gates has one and takes 8 times as long, for it computes the
    gates (512 units, 512 steps, one thread, onnxruntime 1.32: 33 ms against 4.4 ms in blocks of 64).
    """
    blocks, size, _ = recurrent_GPP.shape
    read_GPP = recurrent_GPP.mT

    def step(hidden_BE: torch.Tensor, drive_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        read_BG1P = hidden_BE.unflatten(-1, (blocks, 1, size)) @ read_GPP
        heard_BE = torch.tanh(drive_BE + read_BG1P.flatten(-3))
        hidden_BE = hidden_BE + leak_E * (heard_BE - hidden_BE)
        return hidden_BE, hidden_BE.clone()  # scan forbids outputs that share memory

    last_BE, hidden_TBE = scan(step, state_BE, drive_BTE.transpose(0, 1))
    return hidden_TBE.transpose(0, 1), last_BE


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, leaky_recurrence)


def in_torch(core: Core, path: str) -> Lowered:
    return Lowered(path, leaky_recurrence)  # torch has the scan itself
