"""x cos + turned(x) sin => RotaryEmbedding(x, places, cos, sin): one node for four to eight.

Features turn in twos: each with the one half a head further on, or with the next. An operator of onnxruntime's own. Of
cos and sin it reads one number for two features, so both must have the same; and a row for each place, of which every
token names one: tokens of one batch may be at places of their own, and a table that was computed for them has a row for
each.

B batch, T time, H heads, C width of a head
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thesean.deploy.lowering.lean.edit import (
    MICROSOFT,
    Node,
    Value,
    along_last,
    constant,
    dims,
    insert,
    ints,
    is_kind,
    is_private,
    number,
    other,
    piece,
    producer,
    replace,
    shaped,
    small,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_DEPTH = 16  # nodes between a table and what it is computed from

# What leaves numbers of a row alike that are, where the row is as wide before.
_ROW_BY_ROW = (
    "Cast", "Cos", "Expand", "Floor", "Gather", "Identity", "Neg", "Sin", "Slice", "Squeeze", "Unsqueeze",
)  # fmt: skip


class Turn(NamedTuple):
    """x cos + turned(x) sin, whether features turn with the next one, and the nodes that compute it."""

    x: Value
    cos: Value
    sin: Value
    next_to: bool
    nodes: list[Node]


class Turned(NamedTuple):
    """(-x_2, x_1) of x, or (x_2, x_1), and the nodes: `sign`, what of the sine's two numbers the first is of the second
    then.
    """

    x: Value
    sign: int
    next_to: bool
    nodes: list[Node]


class Layout(NamedTuple):
    """Of x as (B, H, T, C), or as (B, T, H, C); whether rows of the batch have places of their own."""

    heads_first: bool
    by_row: bool


def fuse_rotation(model: ir.Model) -> int:
    changed = 0
    tables: dict[tuple[int, int, bool], tuple[Value, Value, Value]] = {}
    for node in list(model.graph):
        found = _turn(node) if is_kind(node, "Add") else None
        layout = None if found is None else _layout(found)
        if found is None or layout is None:
            continue
        key = id(found.cos), id(found.sin), found.next_to
        if key not in tables:
            tables[key] = _tables(node, found, layout)
        _fuse(node, found, layout, *tables[key])
        changed += 1
    return changed


def _turn(node: Node) -> Turn | None:
    for one in node.inputs:
        by_cos, by_sin = producer(one, "Mul"), producer(other(node, one), "Mul")
        if by_cos is None or by_sin is None:
            continue
        for value in by_sin.inputs:
            found = _gathered(value) or _joined(value)
            if found is None or not any(v is found.x for v in by_cos.inputs):
                continue
            x, sign, next_to, between = found
            cos, sin, width = other(by_cos, x), other(by_sin, value), dims(x)[-1]
            # of the second feature x_2 cos_2 + x_1 sin_2, of the first x_1 cos_1 - x_2 sin_2
            if _alike(cos, width, next_to) == 1 and _alike(sin, width, next_to) == sign:
                return Turn(x, cos, sin, next_to, [node, by_cos, by_sin, *between])
    return None


def _gathered(value: Value) -> Turned | None:
    gather = producer(value, "Gather")
    if gather is None:
        return None
    x, places = gather.inputs[0], gather.inputs[1].const_value
    sizes = dims(x) or [""]
    if places is None or not along_last(gather, x) or not _of_heads(sizes):
        return None
    width = sizes[-1]
    for next_to, swapped in ((False, np.roll(np.arange(width), width // 2)), (True, np.arange(width) ^ 1)):
        if np.array_equal(places.numpy(), swapped):
            return Turned(x, -1, next_to, [gather])
    return None


def _joined(value: Value) -> Turned | None:
    stacked = producer(value, "Reshape")
    joined = producer(value if stacked is None else stacked.inputs[0], "Concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    rank = len(dims(joined.outputs[0]) or [])
    parts, nodes = list(joined.inputs), [joined]
    if not along_last(joined, joined.outputs[0]):
        return None
    if stacked is not None:  # columns, of which the two next to each other make a row
        columns = [producer(part, "Unsqueeze") for part in parts]
        axes = [None if c is None else small(c.inputs[1]) for c in columns]
        if any(a is None or a.tolist() not in ([-1], [rank - 1]) for a in axes):
            return None
        parts = [c.inputs[0] for c in columns if c is not None]
        nodes = [stacked, joined, *(c for c in columns if c is not None)]
    negative = producer(parts[0], "Neg")
    if negative is None:
        return None
    taken, nodes = [parts[1], negative.inputs[0]], [*nodes, negative]
    cut = _columns(taken) if stacked is not None else _halves(taken)
    if cut is None or not _of_heads(dims(cut[0]) or [""]) or dims(value) != dims(cut[0]):
        return None
    return Turned(cut[0], 1, stacked is not None, [*nodes, *cut[1]])


def _halves(parts: list[Value]) -> tuple[Value, list[Node]] | None:
    """Of which value they are the halves, and the node that cut it."""
    split = parts[0].producer()
    if split is None or not is_kind(split, "Split") or [v for v in split.outputs if v.uses()] != parts:
        return None
    x, sizes = split.inputs[0], dims(split.inputs[0]) or [""]
    if not along_last(split, x) or not all(map(is_private, parts)):
        return None
    whole = isinstance(sizes[-1], int) and all((dims(v) or [""])[-1] == sizes[-1] // 2 for v in parts)
    return (x, [split]) if whole else None


def _columns(parts: list[Value]) -> tuple[Value, list[Node]] | None:
    """Of which value they are the even features and the odd ones, and the nodes that took them."""
    nodes = [producer(part, "Slice") for part in parts]
    first, second = nodes
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x, sizes = first.inputs[0], dims(first.inputs[0]) or [""]
    for start, node in enumerate((first, second)):
        taken = piece(node)
        if taken is None or not isinstance(sizes[-1], int) or taken.end < sizes[-1]:
            return None
        if (taken.start, taken.step, taken.axis) != (start, 2, len(sizes) - 1):
            return None
    return x, [first, second]


def _of_heads(sizes: list[int | str]) -> bool:
    return len(sizes) == 4 and isinstance(sizes[-1], int) and sizes[-1] % 2 == 0


def _in_twos(numbers: np.ndarray, next_to: bool) -> np.ndarray:
    """(2, ..., C / 2) of the last axis: what turns with what."""
    return np.stack((numbers[..., ::2], numbers[..., 1::2]) if next_to else tuple(np.split(numbers, 2, axis=-1)))


def _alike(value: Value | None, width: int, next_to: bool, depth: int = _DEPTH) -> int:
    """1 where in a value's rows, `width` wide or the same number throughout, those that turn together are the same, -1
    where the first is the second's negative, 0 where neither is known.
    """
    if value is None or not depth:
        return 0
    if value.const_value is not None:
        return _alike_numbers(value.const_value, width, next_to)
    sizes, node = dims(value), value.producer()
    if sizes == [] or (sizes is not None and sizes[-1] == 1):
        return 1
    if node is None or sizes is None or sizes[-1] != width:
        return 0
    given = [v for v in node.inputs if v is not None]
    if is_kind(node, "Concat"):
        same = len(given) == 2 and given[0] is given[1] and along_last(node, value)
        return int(same and not next_to)
    if is_kind(node, "Reshape"):
        return int(next_to and _repeated(given[0]))
    if is_kind(node, "Mul", "Add", "Sub"):
        signs = [_alike(v, width, next_to, depth - 1) for v in given]
        return signs[0] * signs[1] if is_kind(node, "Mul") else signs[0] * (signs[0] == signs[1])
    if is_kind(node, *_ROW_BY_ROW):
        before = dims(given[0])
        if before is None or before[-1] != width or (is_kind(node, "Gather") and not _of_rows(node, before)):
            return 0
        sign = _alike(given[0], width, next_to, depth - 1)
        return abs(sign) if is_kind(node, "Cos") else max(sign, 0) if is_kind(node, "Floor") else sign
    return 0


def _repeated(value: Value) -> bool:
    """Whether its last axis holds one number twice."""
    node, sizes = value.producer(), dims(value)
    if node is None or not is_kind(node, "Expand") or not sizes or sizes[-1] != 2:
        return False
    return (dims(node.inputs[0]) or [""])[-1] == 1


def _of_rows(gather: Node, sizes: list[int | str]) -> bool:
    return len(sizes) > 1 and number(gather, "axis", 0) in range(len(sizes) - 1)


def _alike_numbers(tensor: ir.TensorProtocol, width: int, next_to: bool) -> int:
    if tensor.size == 1 or tensor.shape[-1] == 1:
        return 1
    if tensor.shape[-1] != width:
        return 0
    first, second = _in_twos(tensor.numpy(), next_to)
    return 1 if np.array_equal(first, second) else -1 if np.array_equal(first, -second) else 0


def _layout(found: Turn) -> Layout | None:
    import onnx_ir as ir

    cos, sin, (batch, *between, width) = dims(found.cos), dims(found.sin), dims(found.x)
    if cos != sin or not cos or len(cos) > 4 or cos[-1] != width:
        return None
    if not (found.x.dtype == found.cos.dtype == found.sin.dtype == ir.DataType.FLOAT):
        return None
    rows, *places, _ = [1] * (4 - len(cos)) + cos
    if rows not in (1, batch) or 1 not in places:
        return None
    for heads_first, time in ((True, between[1]), (False, between[0])):
        heads = between[0] if heads_first else between[1]
        if time != 1 and places == ([1, time] if heads_first else [time, 1]) and isinstance(heads, int):
            return Layout(heads_first, by_row=rows == batch != 1)
    return None


def _tables(before: Node, found: Turn, layout: Layout) -> tuple[Value, Value, Value]:
    """Places, and a row of cos and sin for each, (B T, C / 2), or (T, C / 2) where rows of the batch have the same."""
    graph, width, rank = before.graph, dims(found.x)[-1], len(dims(found.cos))
    half = width // 2
    made: list[Value] = []
    for value in (found.cos, found.sin):
        of = value.producer()
        begin, step = (1, 2) if found.next_to else (half, 1)  # the second of each two
        cut = [ints(graph, n) for n in (begin, width, rank - 1, step)]
        (right,) = insert(before, "Slice", [value, *cut], like=[shaped(value, *dims(value)[:-1], half)], of=of)
        rows = shaped(value, "places", half)
        made += insert(before, "Reshape", [right, ints(graph, -1, half)], like=[rows], of=of)
    if not layout.by_row:
        return ints(graph, 0), made[0], made[1]
    return _places(before, found.cos, rank - 2 if layout.heads_first else rank - 3), made[0], made[1]


def _places(before: Node, cos: Value, time: int) -> Value:
    """0, 1, ... as (B, T)."""
    import onnx_ir as ir

    graph, of, sizes = before.graph, cos.producer(), dims(cos)
    one = ir.Value(name="size", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    (batch,) = insert(before, "Shape", [cos], {"start": 0, "end": 1}, like=[one], of=of)
    (steps,) = insert(before, "Shape", [cos], {"start": time, "end": time + 1}, like=[one], of=of)
    (shape,) = insert(before, "Concat", [batch, steps], {"axis": 0}, like=[shaped(one, 2)], of=of)
    (count,) = insert(before, "ReduceProd", [shape], {"keepdims": 0}, like=[shaped(one)], of=of)
    zero, step = (constant(graph, f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
    (flat,) = insert(before, "Range", [zero, count, step], like=[shaped(one, "places")], of=of)
    (places,) = insert(before, "Reshape", [flat, shape], like=[shaped(one, sizes[0], sizes[time])], of=of)
    return places


def _fuse(node: Node, found: Turn, layout: Layout, places: Value, cos: Value, sin: Value) -> None:
    """Heads that lie within a token's row are turned where they lie."""
    graph, made, sizes = node.graph, node.outputs[0], dims(found.x)
    turn = partial(insert, node, "RotaryEmbedding", domain=MICROSOFT)
    attributes = {"interleaved": int(found.next_to)}
    if layout.heads_first:
        (new,) = turn([found.x, places, cos, sin], attributes, like=[made])
    else:
        batch, time, heads, width = sizes
        flat = shaped(made, batch, time, heads * width)
        row = _row(found.x, heads * width)
        if row is None:
            (row,) = insert(node, "Reshape", [found.x, ints(graph, 0, 0, heads * width)], like=[flat])
        turned = turn([row, places, cos, sin], {**attributes, "num_heads": heads}, like=[flat])
        (new,) = insert(node, "Reshape", [*turned, ints(graph, 0, 0, heads, width)], like=[made])
    replace(made, new)
    graph.remove(found.nodes, safe=True)


def _row(x: Value, columns: int) -> Value | None:
    """What heads were cut from, (B, T, H C)."""
    node = x.producer()
    if node is None or not is_kind(node, "Reshape") or small(node.inputs[1]) is None:
        return None
    row: Value = node.inputs[0]
    return row if (dims(row) or [])[:-1] == dims(x)[:2] and dims(row)[-1] == columns else None
