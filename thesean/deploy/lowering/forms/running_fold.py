"""Running products, sums of exponentials, largest and least values as ONNX Scan, which has none of them.

B batch, T time
"""

from __future__ import annotations

from functools import partial

import torch
from torch._higher_order_ops import scan  # the operator that the exporter turns into ONNX Scan; no public name yet

from thesean.deploy.lowering.lowered import Lowered
from thesean.kernels.running_fold import JOINED, Fold
from thesean.targets.shared.core import Core


def running_fold(x_BT: torch.Tensor, before_B: torch.Tensor, *, fold: Fold) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact at any length. By CumSum, as torch's exporter writes it, the logarithm of a sum of exponentials is -inf at
    steps that are 88 below the largest of the sequence.
    """
    joined = JOINED[fold]

    def step(folded_B: torch.Tensor, x_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        folded_B = joined(folded_B, x_B)
        return folded_B, folded_B.clone()  # scan forbids outputs that share memory

    last_B, folds_TB = scan(step, before_B, x_BT.transpose(0, 1))
    return folds_TB.transpose(0, 1), last_B


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, partial(running_fold, fold=core.settings["fold"]))
