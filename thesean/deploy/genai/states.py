"""The states of a file as onnxruntime-genai carries them.

It knows a cache, `past_key_values.N.key` and `.value`, (batch, heads, past, width), whose length it counts itself; and
two tensors of one shape for all layers, `.conv_state` and `.recurrent_state`, which start as zeros. Its buffer of what
comes in is the one of what goes out (recurrent_state.cpp), so that a graph has to read all of a state before it writes
any. Hence all states that are no cache are two rows: whole numbers and the others, cut apart at once. What is
remembered of a window is the end of a cache of all steps there, and a latent is cut in two, a key's half and a value's.

Of a batch whose prompts are padded on the left, 0.18.0 was seen to give a mask of ones alone: which of the first tokens
are padding is found in the graph, and how many they are is one more state. Positions count what is seen.

B batch, T time, P steps that are remembered, S = P + T, G heads of keys, K their width, W steps of a window, R width of
a latent
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
POSITIONS = "position_ids"  # genai fills an input of this name by itself
_END = 2**63 - 1
_OF = f"{PAST}_of_"  # how the length of a window's cache is called, its steps behind
_BEHIND = 3  # of a cached attention's inputs: its past keys and values from those that come


@dataclass(frozen=True, kw_only=True)
class Caches:
    """What genai is told of the keys and values: how many pairs, and the shape of the first."""

    layers: int
    heads: int
    width: int


def rename_states(model: ir.Model, tokens: str, mask: str | None, pad: int) -> Caches:
    """Give a model's states genai's names, in place. `tokens` names the input of ids_BT, `mask` that of which of these
    are seen, which becomes the one of all steps so far, (B, S). With a mask, `pad` at the start of a row of several is
    no token.

    Raises ExportError for what genai doesn't carry: caches that aren't all of one shape.
    """
    edit = _Edit(model, tokens)
    before = [v for v in model.graph.inputs if (v.name or "").startswith(STATE_IN)]
    after = {v.name: v for v in model.graph.outputs}
    caches: list[tuple[Any, Any]] = []
    packed: dict[str, list[tuple[Any, Any]]] = {_WHOLE: [], _OTHERS: []}
    seen_BP = None
    if mask is not None:
        seen_BP, padded = edit.shorten_mask(mask, pad)
        packed[_WHOLE].append(padded)
    for value in before:
        out = after[STATE_OUT + str(value.name).removeprefix(STATE_IN)]
        sizes, window = _sizes(value), _window(value)
        if len(sizes) == 4 and sizes[2] == PAST:
            caches.append((value, out))
        elif len(sizes) == 4 and window is not None:
            caches.append(edit.lengthen(value, out, window))
        elif len(sizes) == 3 and sizes[1] == PAST:
            caches.extend(edit.halve(value, out))
        elif len(sizes) == 2 and (sizes[1] == PAST or window is not None) and edit.is_bool(value):
            edit.replace(value, seen_BP, window)
        else:
            packed[_WHOLE if edit.is_whole(value) else _OTHERS].append((value, out))
    model.graph.outputs[:] = [v for v in model.graph.outputs if not str(v.name).startswith(STATE_OUT)]
    found = _name_caches(caches)
    edit.see_all(caches)
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
    shapes = dict.fromkeys(tuple(_sizes(v)[k] for k in (1, 3)) for v, _ in caches)
    for index, (value, out) in enumerate(caches):
        layer, kind = index // 2, ("key", "value")[index % 2]
        if _sizes(value)[1:] != _sizes(caches[index - index % 2][0])[1:]:
            raise ExportError(
                f"genai: attention {layer}: expected keys and values of one shape, found {list(_sizes(value))} and "
                f"{list(_sizes(caches[index - 1][0]))}. Replace it, or use runtime='onnxruntime'."
            )
        value.name, out.name = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
    if len(shapes) > 1:
        told = " and ".join(f"{heads} of width {width}" for heads, width in shapes)
        raise ExportError(
            f"genai: expected keys and values of one shape in all attentions that are kept, found heads: {told}. "
            "Replace those of one kind, or use runtime='onnxruntime'."
        )
    heads, width = next(iter(shapes), (1, 1))
    return Caches(layers=len(caches) // 2, heads=int(heads), width=int(width))


def _window(value: Any) -> int | None:
    """W of a state that ends at a window."""
    found = next((d for d in _sizes(value) if isinstance(d, str) and d.startswith(_OF)), None)
    return None if found is None else int(found.removeprefix(_OF))


def _sizes(value: Any) -> tuple[int | str, ...]:
    return tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


class _Edit:
    """New nodes in front of a graph's own, and behind them."""

    def __init__(self, model: ir.Model, tokens: str) -> None:
        import onnx_ir as ir

        self.ir, self.graph = ir, model.graph
        self.first, self.last = ir.tape.Tape(), ir.tape.Tape()
        self.tokens = next(v for v in self.graph.inputs if v.name == tokens)
        self.unseen: list[tuple[Any, int | None]] = []
        self.zero = self.ints(0)

    def ints(self, *values: int) -> Any:
        import numpy as np

        return self.first.op("Constant", [], {"value": self.ir.tensor(np.array(values, np.int64))})

    def is_bool(self, value: Any) -> bool:
        return bool(value.dtype == self.ir.DataType.BOOL)

    def is_whole(self, value: Any) -> bool:
        return bool(value.dtype == self.ir.DataType.INT64)

    def last_of(self, value: Any, axis: int, window: int | None) -> Any:
        """Of all steps the W - 1 that a window keeps."""
        if window is None:
            return value
        start = self.ints(-(window - 1) if window > 1 else _END)
        return self.first.op("Slice", [value, start, self.ints(_END), self.ints(axis)])

    def lengthen(self, value: Any, out: Any, window: int) -> tuple[Any, Any]:
        """The cache of all steps whose end is a window's: no more of it is read, and it is right where genai takes
        steps back.
        """
        ir, node = self.ir, out.producer()
        if node is None or value not in node.inputs or list(node.inputs).index(value) < _BEHIND:
            raise ExportError(
                f"genai: {value.name}: expected a cache that an attention reads, found {list(_sizes(value))} behind "
                f"{node.op_type if node is not None else 'nothing'}. Replace it, or use runtime='onnxruntime'."
            )
        new_BGTK = node.inputs[list(node.inputs).index(value) - _BEHIND]
        batch, heads, _, width = _sizes(value)
        whole_BGPK = ir.Value(type=value.type, shape=ir.Shape([batch, heads, PAST, width]))
        after_BGSK = ir.Value(type=value.type, shape=ir.Shape([batch, heads, "total", width]))
        ir.convenience.replace_all_uses_with(value, self.last_of(whole_BGPK, 2, window))
        self.last.op("Concat", [whole_BGPK, new_BGTK], {"axis": 2}, output=after_BGSK)
        return whole_BGPK, after_BGSK

    def halve(self, value: Any, out: Any) -> list[tuple[Any, Any]]:
        """A latent_BPR as a key and a value, (B, 1, P, R / 2)."""
        ir, (batch, _, width) = self.ir, _sizes(value)
        half, rest = divmod(int(width), 2)
        if rest:
            raise ExportError(
                f"genai: {value.name}: expected a latent of an even width, to be cut in a key and a value, found "
                f"{width}. Give the target an even one, or use runtime='onnxruntime'."
            )
        pairs = [
            [ir.Value(type=value.type, shape=ir.Shape([batch, 1, length, half])) for length in (PAST, "total")]
            for _ in range(2)
        ]
        one = self.ints(1)
        both_B1PR = self.first.op("Concat", [before for before, _ in pairs], {"axis": 3})
        ir.convenience.replace_all_uses_with(value, self.first.op("Squeeze", [both_B1PR, one]))
        after_B1SR = self.last.op("Unsqueeze", [out, one])
        for at, (_, after) in enumerate(pairs):
            ends = [self.ints(n) for n in (at * half, (at + 1) * half, 3)]
            self.last.op("Slice", [after_B1SR, *ends], output=after)
        return [(before, after) for before, after in pairs]

    def replace(self, value: Any, seen_BP: Any, window: int | None) -> None:
        """What reads which steps held a token reads the mask; without one, see `see_all`."""
        if seen_BP is None:
            self.unseen.append((value, window))
        else:
            self.ir.convenience.replace_all_uses_with(value, self.last_of(seen_BP, 1, window))

    def shorten_mask(self, name: str, pad: int) -> tuple[Any, tuple[Any, Any]]:
        """The mask's input becomes that of all steps; its last T are what the network reads -> the others, seen_BP, and
        the state of how many a row's first steps are padding.
        """
        ir = self.ir
        mask: Any = next(v for v in self.graph.inputs if v.name == name)
        whole_BS = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "total"]))
        whole_BS.doc_string = mask.doc_string
        times = self.first.op("Shape", [self.tokens], {"start": 1})
        start = self.first.op("Neg", [times])
        axis, end = self.ints(1), self.ints(_END)
        shown_BS, padded = self._without_padding(whole_BS, times, axis, pad)
        new_BT = self.first.op("Slice", [shown_BS, start, end, axis])
        positions: Any
        for positions in [v for v in self.graph.inputs if v.name == POSITIONS]:
            count_BS = self.first.op("CumSum", [shown_BS, self.first.op("Squeeze", [axis])])
            place_BS = self.first.op("Max", [self.first.op("Sub", [count_BS, axis]), self.zero])
            place_BT = self.first.op("Slice", [place_BS, start, end, axis])
            place_BT = self.first.op("Cast", [place_BT], {"to": int(positions.dtype)})
            ir.convenience.replace_all_uses_with(positions, place_BT)
        if mask.dtype != ir.DataType.INT64:
            new_BT = self.first.op("Cast", [new_BT], {"to": int(mask.dtype)})
        seen_BP = self.first.op("Slice", [shown_BS, self.zero, start, axis])
        ir.convenience.replace_all_uses_with(mask, new_BT)
        self.graph.inputs[list(self.graph.inputs).index(mask)] = whole_BS
        mask.name = f"{name}_of_the_chunk"
        return self.first.op("Cast", [seen_BP], {"to": int(ir.DataType.BOOL)}), padded

    def _without_padding(self, whole_BS: Any, times: Any, axis: Any, pad: int) -> tuple[Any, tuple[Any, Any]]:
        """A mask with zeros where a row of several begins with `pad`, and the state of how many steps these are."""
        ir, op, whole_numbers = self.ir, self.first.op, {"to": int(self.ir.DataType.INT64)}
        before_B = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
        scalar = op("Squeeze", [axis])
        length = op("Shape", [whole_BS], {"start": 1})
        rows = op("Shape", [self.tokens], {"start": 0, "end": 1})
        is_pad_BT = op("Equal", [op("Cast", [self.tokens], whole_numbers), self.ints(pad)])
        words_BT = op("CumSum", [op("Cast", [op("Not", [is_pad_BT])], whole_numbers), scalar])
        in_front_BT = op("Cast", [op("Equal", [words_BT, self.zero])], whole_numbers)
        counted_B = op("ReduceSum", [in_front_BT, axis], {"keepdims": 0})
        starts = op("And", [op("Equal", [length, times]), op("Greater", [rows, axis])])  # a prompt, of several rows
        padding_B = op("Where", [starts, counted_B, before_B])
        step_S = op("Range", [op("Squeeze", [self.zero]), op("Squeeze", [length]), scalar])
        shown_BS = op("GreaterOrEqual", [step_S, op("Unsqueeze", [padding_B, axis])])
        return op("Where", [shown_BS, whole_BS, self.zero]), (before_B, padding_B)

    def see_all(self, caches: list[tuple[Any, Any]]) -> None:
        """Without a mask every step that is remembered was a token."""
        import numpy as np

        for value, window in self.unseen:
            batch = self.first.op("Shape", [self.tokens], {"start": 0, "end": 1})
            # any cache tells P: genai has one length for all, and a window's is one of all steps by now
            past = self.first.op("Shape", [caches[0][0]], {"start": 2, "end": 3})
            shape = self.first.op("Concat", [batch, past], {"axis": 0})
            yes = self.ir.tensor(np.array([True]))
            seen_BP = self.first.op("ConstantOfShape", [shape], {"value": yes})
            self.ir.convenience.replace_all_uses_with(value, self.last_of(seen_BP, 1, window))

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
        columns = self.first.op_multi_out("Split", [past, self.ints(*widths)], {"axis": 1}, num_outputs=len(pairs))
        rows = []
        for column_BN, (value, out), shape in zip(columns, pairs, shapes, strict=True):
            row_alone = bool(_sizes(value)) and _sizes(value)[0] == "batch"
            if not row_alone:  # one for all rows of the batch, which start together
                column_BN = self.first.op("Slice", [column_BN, self.zero, self.ints(1), self.zero])
            state = self.first.op("Reshape", [column_BN, self.ints(-1, *shape)])
            if value.dtype != dtype:
                state = self.first.op("Cast", [state], {"to": int(value.dtype)})
            ir.convenience.replace_all_uses_with(value, state)
            if value.dtype != dtype:
                out = self.last.op("Cast", [out], {"to": int(dtype)})
            batch = self.last.op("Shape", [self.tokens], {"start": 0, "end": 1})
            width = self.last.op("Shape", [column_BN], {"start": 1})
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
        self.graph.sort()  # what was cut out of a row is read by what was made before
        names: set[str] = {str(v.name) for v in (*self.graph.inputs, *self.graph.outputs)}
        for number, node in enumerate((*self.first.nodes, *self.last.nodes)):
            node.name = f"/genai/{node.op_type}_{number}"
            for k, output in enumerate(node.outputs):
                if output.name not in names:
                    output.name = f"genai_{number}_{k}"
