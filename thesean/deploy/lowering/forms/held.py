"""The last tokens and those that were kept as one function of the ONNX model, with a branch of its own for one step.

A step drops the least of what was kept and of what leaves the window, adds its own row at the end, and attends over
what is left: one softmax, nothing sorted, no older state. Who is dropped hangs on what was held before alone: it is
found out for all layers at once, where the first of them begins. See forms/window.py for why a step is not written as a
chunk.

B batch, T time, W window, M kept, N = M + W, H heads, G heads of keys and values, C width of queries and keys, K width
of values, X = C + K + 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thesean.deploy.lowering.forms import kept_attention, window_attention
from thesean.deploy.lowering.held_function.any_steps import any_steps
from thesean.deploy.lowering.held_function.one_step import one_step
from thesean.deploy.lowering.held_function.shape import Shape
from thesean.deploy.lowering.held_function.who_stays import told, who_stays
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.deploy.lowering.text import branches, tell_steps
from thesean.targets.shared.held import Held
from thesean.targets.shared.steps import Steps

DOMAIN = window_attention.DOMAIN


class LoweredHeld(nn.Module):
    """A call of the function; where steps may hold no token, the module as torch code, its cores lowered."""

    def __init__(self, held: Held, path: str, opset: int) -> None:
        super().__init__()
        from thesean.deploy.lowering.lower import lower_inside  # which finds this file by its name

        self.scale = held.scale
        self.sizes = held.window, held.places, held.fade
        self.window, self.places = held.window, held.places  # the module around it reads them
        self.emitted = Lowered(path, self._emit)
        self.inner = lower_inside(held, opset=opset, path=path)

    def forward(
        self,
        query_BTHC: torch.Tensor,
        row_BTGX: torch.Tensor,
        held_BGNX: torch.Tensor,
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if steps is not None:
            mean_BTHK, held_BGNX = self.inner(query_BTHC, row_BTGX, held_BGNX, steps)
            return mean_BTHK, held_BGNX
        mean_BTE, held = self.emitted(query_BTHC, row_BTGX, held_BGNX)
        return mean_BTE.unflatten(-1, (query_BTHC.shape[2], -1)), held.to(held_BGNX.dtype)

    def _emit(
        self, query_BTHC: torch.Tensor, row_BTGX: torch.Tensor, held_BGNX: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        batch, time, heads, key = query_BTHC.shape
        value = held_BGNX.shape[3] - key - 2
        mean_BTE, held = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{Shape(heads, held_BGNX.shape[1], key, value, *self.sizes).name}",
            (query_BTHC, row_BTGX, held_BGNX),
            {"scale": self.scale},
            dtypes=[query_BTHC.dtype] * 2,
            shapes=[[batch, time, heads * value], held_BGNX.shape],
            version=1,
        )
        return mean_BTE, held


def lower(held: Held, path: str, opset: int) -> LoweredHeld:
    return LoweredHeld(held, path, opset)


def portable(held: Held, path: str, opset: int) -> None:
    """Torch code: its step reads an operator of onnxruntime's own, its cores do not."""


def define(model: Any) -> None:
    """Add the functions that an onnx_ir model calls, and what they call; others stay as they are."""
    calls = [n for n in model.graph if n.domain == DOMAIN and Shape.of(n.op_type) is not None]
    shapes = [shape for name in sorted({n.op_type for n in calls}) if (shape := Shape.of(name)) is not None]
    tell_steps(model, calls)
    opsets = f'"" : {model.opset_imports[""]}, "com.microsoft" : 1, "{DOMAIN}" : 1'
    for shape in shapes:
        given = ["query_BTHC", "row_BTGX", "before", *shape.choosing]
        outputs = ["float[B, T, E] mean", "float[B, G, N, X] held"]
        text = branches(shape.name, given, outputs, (one_step(shape), any_steps(shape)), "<scale> ")
        add_function(model, f'<domain: "{DOMAIN}", opset_import: [{opsets}]>\n{text}')
    for shape, layers in _tell_who_stays(model, calls):
        add_function(model, f'<domain: "{DOMAIN}", opset_import: [{opsets}]>\n{who_stays(shape, layers)}')
    for fade in sorted({shape.fade for shape in shapes}):
        kept_attention.add(model, fade)
    if shapes:
        window_attention.add(model, window_attention.NAME)


def _tell_who_stays(model: Any, calls: list[Any]) -> set[tuple[Shape, int]]:
    """Give each call what its step is told, found out for all that are alike where the first of them stands; what was
    written for. Calls end with `is_step`.
    """
    import onnx_ir as ir

    written = set()
    for layers in _alike(model, calls):
        shape = Shape.of(layers[0].op_type)
        assert shape is not None  # they are calls of it
        given = [*(layer.inputs[2] for layer in layers), layers[0].inputs[-1]]
        count = told(shape, len(layers), 0)[-1] + (1 if shape.fade else len(layers))
        choice = ir.Node(DOMAIN, shape.who_stays(len(layers)), given, num_outputs=count)
        for at, value in enumerate(choice.outputs):
            value.name = f"{layers[0].outputs[0].name}_stays_{at}"
        model.graph.insert_before(layers[0], choice)
        for index, layer in enumerate(layers):
            own = [choice.outputs[at] for at in told(shape, len(layers), index)]
            inputs, is_step = list(layer.inputs[:-1]), layer.inputs[-1]
            layer.resize_inputs(len(inputs) + len(own) + 1)
            for at, value in enumerate([*own, is_step], len(inputs)):
                layer.replace_input_with(at, value)
        written.add((shape, len(layers)))
    return written


def _alike(model: Any, calls: list[Any]) -> list[list[Any]]:
    """Calls of one shape and one length, of those whose state is there before the first of them; others stand alone."""
    place = {node: index for index, node in enumerate(model.graph)}
    found: dict[tuple[Any, ...], list[Any]] = {}
    for call in calls:
        first = found.setdefault((call.op_type, call.inputs[-1]), [call])[0]
        maker = call.inputs[2].producer()
        if call is first:
            continue
        if maker is None or place[maker] < place[first]:
            found[call.op_type, call.inputs[-1]].append(call)
        else:
            found[call.op_type, call.inputs[-1], call] = [call]
    return list(found.values())
