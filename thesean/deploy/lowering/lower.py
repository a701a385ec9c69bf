"""Recurrent cells -> ONNX operators: what torch's exporter can't write with a dynamic length or a given state.

B batch, T time, D width, L layers times directions, H heads, F features of a key, K width of a value
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from thesean.deploy.lowering.cells import LoweredCell, LoweredLinearAttention, LoweredLinearRecurrence
from thesean.deploy.lowering.scans import (
    LoweredCausalConvolution,
    LoweredDeltaRule,
    LoweredDiagonalScan,
    LoweredLeakyRecurrence,
)
from thesean.deploy.lowering.window import LoweredWindowAttention
from thesean.targets.shared.cores import (
    CausalConvolutionCore,
    DeltaRuleCore,
    DiagonalScanCore,
    LeakyRecurrence,
    LinearAttentionCore,
    LinearRecurrence,
    WindowAttentionCore,
)


def lower_cells(module: nn.Module, *, opset: int = 18, path: str = "") -> nn.Module:
    """A frozen deep copy of `module` whose recurrent cells emit ONNX operators under `torch.onnx.export(dynamo=True)`.

    nn.RNN, nn.GRU and nn.LSTM become RNN, GRU and LSTM; LinearRecurrence and LeakyRecurrence become Scan;
    LinearAttentionCore, DeltaRuleCore and DiagonalScanCore become com.microsoft::LinearAttention, CausalConvolutionCore
    com.microsoft::CausalConvWithState, and WindowAttentionCore a function that `window_function.define` adds to the
    model. All keep dynamic batch and length; example sizes must be 2 or more. `opset` is the one that the export will
    ask for. Run outside an export, the copy raises ExportError. Raises ExportError for a cell without an ONNX form (an
    LSTM with projections), naming its path.
    """
    # One cell used in two places stays one cell. The original is kept beside its stand-in, or its id would be reused.
    lowered: dict[int, tuple[nn.Module, nn.Module]] = {}

    def lower(child: nn.Module, where: str) -> nn.Module:
        if id(child) not in lowered:
            replacement = _lowered(child, where, opset)
            lowered[id(child)] = (child, child if replacement is None else replacement)
            if replacement is None:
                for name, grandchild in list(child._modules.items()):  # named_children() skips repeated ones
                    if grandchild is not None:
                        setattr(child, name, lower(grandchild, f"{where}.{name}" if where else name))
        return lowered[id(child)][1]

    # without gradients: torch 2.13's scan warns about .grad of inner tensors when it traces a trainable graph
    return lower(copy.deepcopy(module).requires_grad_(False), path)


def _lowered(module: nn.Module, path: str, opset: int) -> nn.Module | None:
    for kind, make in _FORMS.items():
        if isinstance(module, kind):
            return make(module, path, opset)
    return None


_FORMS: dict[type[nn.Module], Callable[[Any, str, int], nn.Module]] = {
    nn.RNNBase: LoweredCell,
    LinearRecurrence: lambda module, path, opset: LoweredLinearRecurrence(path),
    LinearAttentionCore: lambda module, path, opset: LoweredLinearAttention(path),
    DeltaRuleCore: lambda module, path, opset: LoweredDeltaRule(path),
    DiagonalScanCore: lambda module, path, opset: LoweredDiagonalScan(path),
    CausalConvolutionCore: lambda module, path, opset: LoweredCausalConvolution(path),
    LeakyRecurrence: lambda module, path, opset: LoweredLeakyRecurrence(path),
    WindowAttentionCore: lambda module, path, opset: LoweredWindowAttention(path),
}
