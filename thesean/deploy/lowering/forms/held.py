"""The last tokens and those that were kept as one function of the ONNX model, with a branch of its own for one step.

A step takes the place of the least of what was kept and of what leaves the window, and attends over all places: one
softmax, nothing sorted, nothing moved. Who is dropped hangs on what was held before alone: it is found out for all
layers at once, where the first of them begins. See forms/window.py for why a step is not written as a chunk.

B batch, T time, W window, M places before it, N = M + W, H heads, G heads of keys and values, C width of queries and
keys, K width of values
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thesean.deploy.lowering.held_function.any_steps import any_steps
from thesean.deploy.lowering.held_function.one_step import one_step
from thesean.deploy.lowering.held_function.shape import CHOSEN, Shape
from thesean.deploy.lowering.held_function.who_stays import who_stays
from thesean.deploy.lowering.lowered import Lowered, add_function
from thesean.deploy.lowering.text import branches, tell_steps
from thesean.targets.shared.held import Held, HeldTokens
from thesean.targets.shared.steps import Steps

DOMAIN = "thesean"

_GIVEN = ("query_BTHC", "key_BTGC", "value_BTGK", "score_BTG", "keys", "values", "marks_before")
_MADE = ("float[B, T, E] mean", "float[B, G, N, C] keys", "float[B, G, N, K] values", "float[B, G, two, N] marks")
_MARKS = _GIVEN.index("marks_before")


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
        key_BTGC: torch.Tensor,
        value_BTGK: torch.Tensor,
        score_BTG: torch.Tensor,
        held: HeldTokens,
        steps: Steps | None = None,
    ) -> tuple[torch.Tensor, HeldTokens]:
        if steps is not None:
            made: tuple[torch.Tensor, HeldTokens] = self.inner(query_BTHC, key_BTGC, value_BTGK, score_BTG, held, steps)
            return made
        mean_BTE, *after = self.emitted(query_BTHC, key_BTGC, value_BTGK, score_BTG, *held)
        mean_BTHK = mean_BTE.unflatten(-1, (query_BTHC.shape[2], -1))
        return mean_BTHK, HeldTokens(*(now.to(then.dtype) for now, then in zip(after, held, strict=True)))

    def _emit(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_BTHC, _, value_BTGK, _, *held = tensors
        batch, time, heads, key = query_BTHC.shape
        groups, value = value_BTGK.shape[2:]
        made = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{Shape(heads, groups, key, value, *self.sizes).name}",
            tensors,
            {"scale": self.scale},
            dtypes=[query_BTHC.dtype] * 4,
            shapes=[[batch, time, heads * value], *(before.shape for before in held)],
            version=1,
        )
        return tuple(made)


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
        text = branches(shape.name, [*_GIVEN, *CHOSEN], _MADE, (one_step(shape), any_steps(shape, _MADE)), "<scale> ")
        add_function(model, f'<domain: "{DOMAIN}", opset_import: [{opsets}]>\n{text}')
    for shape, layers in sorted(_tell_who_stays(model, calls)):
        add_function(model, f'<domain: "{DOMAIN}", opset_import: [{opsets}]>\n{who_stays(shape, layers)}')


def _tell_who_stays(model: Any, calls: list[Any]) -> set[tuple[Shape, int]]:
    """Give each call what its step is told, found out for all that are alike where the first of them stands; what that
    was written for. Calls end with `is_step`.
    """
    import onnx_ir as ir

    written = set()
    for layers in _alike(model, calls):
        shape = Shape.of(layers[0].op_type)
        assert shape is not None  # they are calls of it
        given = [*(layer.inputs[_MARKS] for layer in layers), layers[0].inputs[-1]]
        chosen = ir.Node(DOMAIN, shape.who_stays(len(layers)), given, num_outputs=len(CHOSEN) * len(layers))
        for at, value in enumerate(chosen.outputs):
            value.name = f"{layers[0].outputs[0].name}_{CHOSEN[at // len(layers)]}_{at % len(layers)}"
        model.graph.insert_before(layers[0], chosen)
        for index, layer in enumerate(layers):
            last = len(layer.inputs) - 1
            own = [*chosen.outputs[index :: len(layers)], layer.inputs[last]]
            layer.resize_inputs(last + len(own))
            for at, value in enumerate(own, last):
                layer.replace_input_with(at, value)
        written.add((shape, len(layers)))
    return written


def _alike(model: Any, calls: list[Any]) -> list[list[Any]]:
    """Calls of one shape and one length, of those whose state is there before the first of them; others stand alone."""
    place = {node: index for index, node in enumerate(model.graph)}
    found: dict[tuple[Any, ...], list[Any]] = {}
    for call in calls:
        first = found.setdefault((call.op_type, call.inputs[-1]), [call])[0]
        maker = call.inputs[_MARKS].producer()
        if call is first:
            continue
        if maker is None or place[maker] < place[first]:
            found[call.op_type, call.inputs[-1]].append(call)
        else:
            found[call.op_type, call.inputs[-1], call] = [call]
    return list(found.values())
