"""A window, its sinks and what is older as one function of the ONNX model, with a branch of its own for one step.

Written for any number of steps, a step costs a hundred small nodes a layer, and a node costs more than what it computes
(onnxruntime 1.32, one thread: .5 microseconds, an `If` 1.3). One step needs a third of them: nothing is in blocks or
transposed, sinks and window are one tensor and one softmax, and a row that holds no token gets log(0).

B batch, T time, S = W + T, W window, N sinks, M = N + W, H heads, G heads of keys and values, R = H / G, C width of
queries and keys, K width of values, k = K + 1, X = C + k, F = 2C features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thesean.deploy.lowering.forms import window_attention
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.deploy.lowering.text import branches, tell_steps
from thesean.deploy.lowering.window_function.any_steps import any_steps
from thesean.deploy.lowering.window_function.one_step import one_step
from thesean.deploy.lowering.window_function.shape import Shape, runs_of
from thesean.targets.shared.signed_softmax import signed_map
from thesean.targets.shared.steps import Steps
from thesean.targets.shared.window import Window

DOMAIN = window_attention.DOMAIN


class LoweredWindow(nn.Module):
    """A call of the function; where steps may hold no token, the module as torch code, its cores lowered."""

    def __init__(self, window: Window, path: str, opset: int) -> None:
        super().__init__()
        from thesean.deploy.lowering.lower import lower_inside  # which finds this file by its name

        self.scale, self.size, self.places, self.ahead = window.scale, window.size, window.places, window.ahead
        self.turned, self.biased = window.rotate is not None, window.bias is not None
        self.gate_H = window.gate_H
        self.emitted = Lowered(path, self._emit)
        self.extra: list[str] = []
        self.runs: tuple[tuple[int, int], ...] = ()
        with torch.no_grad():
            if window.rotate is not None:
                rotate = window.rotate
                # as seen from the last row, the query's: it need not be turned itself
                cos_M1C, sin_M1C = (t.flip(0) for t in rotate.tables(self.places + self.size, torch.zeros(())))
                self._keep("cos_MC", cos_M1C.squeeze(1).contiguous())
                self._keep("sin_MC", -sin_M1C.squeeze(1))
                self._keep("partner_sin_MC", -sin_M1C.squeeze(1)[:, rotate.partner_C])
                self.runs = runs_of(rotate.partner_C.tolist())
                for name in ("partner_C", "leading_C", "rest_C", "sign_C"):
                    self._keep(name, getattr(rotate, name).detach().clone())
            if window.bias is not None:
                bias_HM = window._bias(0, self.places + self.size).detach().float()
                self._keep("bias_HM", bias_HM.flip(1).contiguous())
                self._keep("bias_HW", bias_HM[:, : self.size].contiguous())
        self.inner = lower_inside(window, opset=opset, path=path)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor)
        self.extra.append(name)

    def initial_state(self, x_BTD: torch.Tensor, groups: int, widths: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        return self.inner.initial_state(x_BTD, groups, widths)

    def forward(
        self,
        query_BTHC: torch.Tensor,
        new_BTGX: torch.Tensor,
        log_decay_BTG: torch.Tensor,
        maps: tuple[torch.Tensor, torch.Tensor],
        state: tuple[torch.Tensor, torch.Tensor],
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        if steps is not None or self.ahead:
            made: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = self.inner(
                query_BTHC, new_BTGX, log_decay_BTG, maps, state, steps
            )
            return made
        map_ICF = torch.cat([signed_map(m) for m in maps])
        given = (query_BTHC.flatten(2), new_BTGX.flatten(2), log_decay_BTG, *state, self.gate_H, map_ICF)
        mean_BTHK, linear, held = self.emitted(*given)
        return mean_BTHK, (linear.to(state[0].dtype), held.to(state[1].dtype))

    def _emit(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_BTE, new_BTX, log_decay_BTG, linear, held, gate_H, _ = tensors
        (batch, time, width), heads, groups = query_BTE.shape, len(gate_H), log_decay_BTG.shape[2]
        key = width // heads
        value = new_BTX.shape[2] // groups - key - 1
        shape = Shape(heads, groups, key, value, self.size, self.places, self.turned, self.biased, self.runs)
        mean_BTE, linear, held = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{shape.name}",
            (*tensors, *(getattr(self, name) for name in self.extra)),  # in float32, whatever the network is in
            {"scale": self.scale},
            dtypes=[query_BTE.dtype] * 3,
            shapes=[[batch, time, heads * value], linear.shape, held.shape],
            version=1,
        )
        return mean_BTE.unflatten(-1, (heads, value)), linear, held


def lower(window: Window, path: str, opset: int) -> LoweredWindow:
    return LoweredWindow(window, path, opset)


def portable(window: Window, path: str, opset: int) -> None:
    """Torch code: its step reads an operator of onnxruntime's own, its cores do not."""


def define(model: Any) -> None:
    """Add the functions that an onnx_ir model calls, and what they call; others stay as they are."""
    calls = [n for n in model.graph if n.domain == DOMAIN and Shape.of(n.op_type) is not None]
    shapes = [shape for name in sorted({n.op_type for n in calls}) if (shape := Shape.of(name)) is not None]
    tell_steps(model, calls)
    for shape in shapes:
        add_function(model, _function(shape, model.opset_imports[""]))
    for biased in sorted({shape.biased for shape in shapes}):
        window_attention.add(model, window_attention.BIASED if biased else window_attention.NAME)


def _function(shape: Shape, opset: int) -> str:
    inputs = ["query_BTE", "new_BTX", "log_decay_BTG", "linear", "held", "gate_H", "map_ICF"]
    inputs += (
        ["cos_MC", "sin_MC", "partner_sin_MC", "partner_C", "leading_C", "rest_C", "sign_C"] if shape.turned else []
    )
    inputs += ["bias_HM", "bias_HW"] if shape.biased else []
    outputs = ["float[B, T, E] mean", "float[B, G, F, k] linear", "float[B, G, M, X] held"]
    domains = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "com.microsoft" : 1, "{DOMAIN}" : 1]>'
    return f"{domains}\n{branches(shape.name, inputs, outputs, (one_step(shape), any_steps(shape)), '<scale> ')}"
