"""What passes on the ONNX graph share: what is constant, what has one reader, and nodes in another one's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"

# onnx_ir's own say "or None" of every input, shape and constant; the passes look before they read.
Node = Any
Value = Any

_FRESH = "_lean"

_SMALL = 64  # elements of a constant that a pass may look at


def producer(value: Value | None, *kinds: str, domain: str = "") -> Node | None:
    """The node that makes a value, if it is of one of the kinds and one node alone reads that value."""
    node = None if value is None else value.producer()
    return node if node is not None and is_kind(node, *kinds, domain=domain) and is_private(value) else None


def is_kind(node: Node, *kinds: str, domain: str = "") -> bool:
    return node.domain == domain and node.op_type in kinds


def is_private(value: Value | None) -> bool:
    """Whether one node reads it, once, and the graph does not give it away."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def reader(value: Value, *kinds: str) -> Node | None:
    """The only node that reads a value, if it is of one of the kinds."""
    if not is_private(value):
        return None
    node = value.consumers()[0]
    return node if is_kind(node, *kinds) else None


def small(value: Value | None) -> np.ndarray | None:
    """The numbers of a constant of few elements."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.size > _SMALL else np.asarray(tensor.numpy())


def is_scalar(value: Value | None, number: float) -> bool:
    """Whether a value is that number, to float32's digits."""
    found = small(value)
    return found is not None and found.size == 1 and bool(np.isclose(float(found.reshape(())), number, rtol=1e-6))


def other(node: Node, value: Value) -> Value | None:
    """The second operand of two."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def number(node: Node, name: str, default: Any) -> Any:
    """An attribute's value."""
    return node.attributes[name].value if name in node.attributes else default


def along_last(node: Node, value: Value) -> bool:
    """Whether a node works along the last axis of a value, counted from either end."""
    return number(node, "axis", 0) in (-1, len(dims(value) or []) - 1)


class Piece(NamedTuple):
    """What a slice by constants takes of one axis, which is counted from the front."""

    start: int
    end: int
    axis: int
    step: int


def piece(node: Node) -> Piece | None:
    if not is_kind(node, "Slice") or node.inputs[0] is None:
        return None
    size = dims(node.inputs[0])
    given = [small(v) for v in node.inputs[1:]]
    if size is None or len(given) < 3 or any(g is None or g.size != 1 for g in given):
        return None
    start, end, axis = (int(g.reshape(())) for g in given[:3] if g is not None)
    step = int(given[3].reshape(())) if len(given) > 3 and given[3] is not None else 1
    return Piece(start, end, axis % len(size), step)


def ints(graph: ir.Graph, *numbers: int) -> Value:
    """int64 constants, one of each kind in a graph."""
    name = "ints_" + "_".join(str(n).replace("-", "m") for n in numbers)
    return constant(graph, name, np.array(numbers, np.int64))


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> Value:
    import onnx_ir as ir

    found = graph.initializers.get(name)
    if found is None or found.const_value is None or not np.array_equal(found.const_value.numpy(), array):
        found = weight(graph, name, ir.Tensor(array))
    return found


def weight(graph: ir.Graph, name: str, tensor: Any) -> Value:
    """A new initializer of that name, or of one like it where it is taken."""
    import onnx_ir as ir

    taken, wanted, count = graph.initializers, name, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    tensor.name = name
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def lazily(make: Callable[[], np.ndarray], dtype: Any, shape: Sequence[int]) -> Any:
    """A tensor that is made when it is written: a file's weights are in memory once."""
    import onnx_ir as ir

    return ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(make())), dtype, ir.Shape(shape))


def insert(
    before: Node,
    kind: str,
    inputs: Sequence[Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    like: Sequence[Value | None],
    domain: str = "",
    of: Node | None = None,
) -> tuple[Value, ...]:
    """A new node before another one, that comes from the same module, or from that of the node `of`. Its outputs have
    the type and the shape of those in `like`, None for one that nothing reads. The names are new.
    """
    import onnx_ir as ir

    graph = before.graph
    assert graph is not None
    outputs = [
        ir.Value(name="") if v is None else ir.Value(name=_fresh(graph, v), type=v.type, shape=_copied(v.shape))
        for v in like
    ]
    node = ir.node(kind, inputs, attributes, domain=domain, outputs=outputs)
    node.metadata_props.update((before if of is None else of).metadata_props)
    graph.insert_before(before, node)
    return tuple(outputs)


def shaped(value: Value, *dims: Any) -> Value:
    """A model for `like`: the type of a value in another shape."""
    import onnx_ir as ir

    return ir.Value(name=value.name, type=value.type, shape=ir.Shape(dims))


def _fresh(graph: ir.Graph, like: Value) -> str:
    """One that no value of the graph has, those of a file that passes were run on before either."""
    if _FRESH not in graph.meta:
        names = (str(value.name).rpartition(_FRESH) for node in graph for value in node.outputs)
        graph.meta[_FRESH] = max((int(end) for _, found, end in names if found and end.isdecimal()), default=0)
    graph.meta[_FRESH] += 1
    return f"{str(like.name).split(_FRESH)[0]}{_FRESH}{graph.meta[_FRESH]}"


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    import onnx_ir as ir

    return None if shape is None else ir.Shape(list(shape))


def replace(old: Value, new: Value) -> None:
    """Whatever reads `old` reads `new`; an output of the graph keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_before"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def dims(value: Value | None) -> Any:
    """Sizes and the names of those that are not known, as a list; None where a value's shape isn't."""
    import onnx_ir as ir

    if value is None or value.shape is None:
        return None
    found = [d.value if isinstance(d, ir.SymbolicDim) else int(d) for d in value.shape]
    return None if any(d is None for d in found) else found
