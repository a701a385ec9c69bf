"""The states of a file as onnxruntime-genai carries them.

It knows a cache, `past_key_values.N.key` and `.value`, (batch, heads, past, width), whose length it counts itself; and
two tensors of one shape for all layers, `.conv_state` and `.recurrent_state`, which start as zeros. Its buffer of what
comes in is the one of what goes out (recurrent_state.cpp), so that a graph has to read all of a state before it writes
any. Hence all states that are no cache are two rows: whole numbers and the others, cut apart at once.

B batch, T time, P steps that are remembered, S = P + T
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from thesean.errors import ExportError
from thesean.passes.thread_state import PAST, STATE_IN, STATE_OUT

if TYPE_CHECKING:
    import onnx_ir as ir

_WHOLE, _OTHERS = "conv_state", "recurrent_state"  # genai's names: it wants both where it finds one
_END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Caches:
    """What genai is told of the keys and values: how many pairs, and the shape of the first."""

    layers: int
    heads: int
    width: int


def rename_states(model: ir.Model, tokens: str, mask: str | None) -> Caches:
    """Give a model's states genai's names, in place. `tokens` names the input of ids_BT, `mask` that of which of these
    are seen, which becomes the one of all steps so far, (B, S).

    Raises ExportError for what genai doesn't carry: a cache that ends at a window or is a latent, or keys wider than
    their values.
    """
    edit = _Edit(model, tokens)
    before = [v for v in model.graph.inputs if (v.name or "").startswith(STATE_IN)]
    after = {v.name: v for v in model.graph.outputs}
    seen_BP = None if mask is None else edit.shorten_mask(mask)
    caches: list[tuple[Any, Any]] = []
    packed: dict[str, list[tuple[Any, Any]]] = {_WHOLE: [], _OTHERS: []}
    for value in before:
        out = after[STATE_OUT + str(value.name).removeprefix(STATE_IN)]
        sizes = _sizes(value)
        if len(sizes) == 4 and sizes[2] == PAST:
            caches.append((value, out))
        elif len(sizes) == 2 and sizes[1] == PAST and edit.is_bool(value):
            edit.replace(value, seen_BP)
        elif any(isinstance(size, str) and size.startswith(PAST) for size in sizes):
            what = "is a latent" if PAST in sizes else "ends at a window"
            raise ExportError(
                f"genai: {value.name}: expected a cache of all steps, found {list(sizes)}, which {what}: "
                "onnxruntime-genai counts on one row a step. Replace these attentions, or use runtime='onnxruntime'."
            )
        else:
            packed[_WHOLE if edit.is_whole(value) else _OTHERS].append((value, out))
    found = _name_caches(caches)
    edit.see_all(caches)
    model.graph.outputs[:] = [v for v in model.graph.outputs if not str(v.name).startswith(STATE_OUT)]
    model.graph.inputs[:] = [v for v in model.graph.inputs if v not in before]
    for value, out in caches:
        model.graph.inputs.append(value)
        model.graph.outputs.append(out)
    if any(packed.values()):
        for name, pairs in packed.items():
            edit.pack(name, pairs)
    edit.finish()
    return found


def _name_caches(caches: list[tuple[Any, Any]]) -> Caches:
    """Keys and values come in pairs."""
    shapes = {tuple(_sizes(v)[k] for k in (1, 3)) for v, _ in caches[:2]}
    for index, (value, out) in enumerate(caches):
        layer, kind = index // 2, ("key", "value")[index % 2]
        if _sizes(value)[1:] != _sizes(caches[index - index % 2][0])[1:]:
            raise ExportError(
                f"genai: attention {layer}: expected keys and values of one shape, found {list(_sizes(value))} and "
                f"{list(_sizes(caches[index - 1][0]))}. Replace it, or use runtime='onnxruntime'."
            )
        value.name, out.name = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
    heads, width = next(iter(shapes), (1, 1))
    return Caches(layers=len(caches) // 2, heads=int(heads), width=int(width))


def _sizes(value: Any) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


class _Edit:
    """New nodes in front of a graph's own, and behind them."""

    def __init__(self, model: ir.Model, tokens: str) -> None:
        import onnx_ir as ir

        self.ir, self.graph = ir, model.graph
        self.first, self.last = ir.tape.Tape(), ir.tape.Tape()
        self.tokens = next(v for v in self.graph.inputs if v.name == tokens)
        self.unseen: list[Any] = []
        self.zero = self.ints("genai_zero", 0)

    def ints(self, name: str, *values: int) -> Any:
        import numpy as np

        tensor = self.ir.tensor(np.array(values, np.int64), name=name)
        return self.first.op("Constant", [], {"value": tensor})

    def is_bool(self, value: Any) -> bool:
        return bool(value.dtype == self.ir.DataType.BOOL)

    def is_whole(self, value: Any) -> bool:
        return bool(value.dtype == self.ir.DataType.INT64)

    def replace(self, value: Any, seen_BP: Any) -> None:
        """What reads which steps held a token reads the mask; without one, see `see_all`."""
        if seen_BP is None:
            self.unseen.append(value)
        else:
            self.ir.convenience.replace_all_uses_with(value, seen_BP)

    def shorten_mask(self, name: str) -> Any:
        """The mask's input becomes that of all steps; its last T are what the network reads -> the others, seen_BP."""
        ir = self.ir
        mask: Any = next(v for v in self.graph.inputs if v.name == name)
        whole_BS = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "total"]))
        whole_BS.doc_string = mask.doc_string
        times = self.first.op("Shape", [self.tokens], {"start": 1, "end": 2})
        start = self.first.op("Neg", [times])
        axis = self.ints("genai_time", 1)
        new_BT = self.first.op("Slice", [whole_BS, start, self.ints("genai_end", _END), axis])
        if mask.dtype != ir.DataType.INT64:
            new_BT = self.first.op("Cast", [new_BT], {"to": int(mask.dtype)})
        seen_BP = self.first.op("Slice", [whole_BS, self.zero, start, axis])
        ir.convenience.replace_all_uses_with(mask, new_BT)
        self.graph.inputs[list(self.graph.inputs).index(mask)] = whole_BS
        mask.name = f"{name}_of_the_chunk"
        return self.first.op("Cast", [seen_BP], {"to": int(ir.DataType.BOOL)})

    def see_all(self, caches: list[tuple[Any, Any]]) -> None:
        """Without a mask every step that is remembered was a token."""
        import numpy as np

        for value in self.unseen:
            batch = self.first.op("Shape", [self.tokens], {"start": 0, "end": 1})
            past = self.first.op("Shape", [caches[0][0]], {"start": 2, "end": 3})
            shape = self.first.op("Concat", [batch, past], {"axis": 0})
            yes = self.ir.tensor(np.array([True]))
            seen_BP = self.first.op("ConstantOfShape", [shape], {"value": yes})
            self.ir.convenience.replace_all_uses_with(value, seen_BP)

    def pack(self, name: str, pairs: list[tuple[Any, Any]]) -> None:
        """past_key_values.0.NAME, (B, N), cut into the states, and present.0.NAME put together of what they become."""
        ir = self.ir
        dtype = ir.DataType.INT64 if name == _WHOLE else ir.DataType.FLOAT
        shapes = [[1 if isinstance(d, str) else d for d in _sizes(v)[1:]] for v, _ in pairs]
        widths = [prod(map(int, shape)) for shape in shapes]
        past, present = (
            ir.Value(name=f"{when}.0.{name}", type=ir.TensorType(dtype), shape=ir.Shape(["batch", max(1, sum(widths))]))
            for when in ("past_key_values", "present")
        )
        self.graph.inputs.append(past)
        self.graph.outputs.append(present)
        if not pairs:  # nothing is in it
            self.last.op("Identity", [past], output=present)
            return
        columns = self.first.op_multi_out(
            "Split", [past, self.ints(f"genai_{name}_widths", *widths)], {"axis": 1}, num_outputs=len(pairs)
        )
        rows = []
        for index, (column_BN, (value, out), shape) in enumerate(zip(columns, pairs, shapes, strict=True)):
            row_alone = bool(_sizes(value)) and _sizes(value)[0] == "batch"
            if not row_alone:  # one for all rows of the batch, which start together
                column_BN = self.first.op("Slice", [column_BN, self.zero, self.ints(f"genai_{name}_one", 1), self.zero])
            state = self.first.op("Reshape", [column_BN, self.ints(f"genai_{name}_{index}", -1, *shape)])
            if value.dtype != dtype:
                state = self.first.op("Cast", [state], {"to": int(value.dtype)})
            ir.convenience.replace_all_uses_with(value, state)
            if value.dtype != dtype:
                out = self.last.op("Cast", [out], {"to": int(dtype)})
            batch = self.last.op("Shape", [self.tokens], {"start": 0, "end": 1})
            width = self.last.op("Shape", [column_BN], {"start": 1, "end": 2})
            shape_BN = self.last.op("Concat", [batch, width], {"axis": 0})
            if row_alone:
                rows.append(self.last.op("Reshape", [out, shape_BN]))
            else:
                rows.append(self.last.op("Expand", [out, shape_BN]))
        self.last.op("Concat", rows, {"axis": 1}, output=present)

    def finish(self) -> None:
        nodes = list(self.graph)
        self.graph.insert_before(nodes[0], self.first.nodes)
        self.graph.extend(self.last.nodes)
        names: set[str] = {str(v.name) for v in (*self.graph.inputs, *self.graph.outputs)}
        for number, node in enumerate((*self.first.nodes, *self.last.nodes)):
            node.name = f"/genai/{node.op_type}_{number}"
            for k, output in enumerate(node.outputs):
                if output.name not in names:
                    output.name = f"genai_{number}_{k}"
