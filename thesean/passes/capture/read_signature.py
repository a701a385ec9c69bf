"""The calling convention of a captured graph: which dimensions are dynamic, and which integers are indices.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.dataflow import MASK
from thesean.passes.analyse.float_masks import is_mask_of_floats
from thesean.passes.capture.dynamic import Dynamic
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.resample import kept_example
from thesean.passes.graph.signature import InputSpec, Signature

aten = torch.ops.aten


def read_signature(
    graph_module: fx.GraphModule, inputs: dict[str, torch.Tensor], eager: Any, free: Dynamic
) -> Signature:
    """Names for the graph's symbols ("batch", "time", "time_1"), put into its `meta["symbols"]` too, and the output's
    class. `inputs` and `eager` are those of one run, `free` names their dynamic dimensions.
    """
    names: dict[str, str] = {}
    taken: dict[str, list[int]] = {}
    specs = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        shape: list[int | str] = []
        for position, dim in enumerate(node.meta["val"].shape):
            if isinstance(dim, torch.SymInt):
                symbol = str(dim)
                if symbol not in names:
                    base = free[str(node.target)][position]
                    names[symbol] = _name(base, inputs[str(node.target)].shape[position], taken)
                shape.append(names[symbol])
            else:
                shape.append(int(dim))
        value = inputs[str(node.target)]
        high = _rows_indexed(graph_module, node) if not value.is_floating_point() else None
        batch = next((at for at, d in enumerate(shape) if isinstance(d, str) and d.startswith("batch")), None)
        example = kept_example(value, batch)
        mask = is_mask_of_floats(node, value)
        if mask:
            node.meta[MASK] = True
        spec = InputSpec(name=str(node.target), dtype=value.dtype, shape=tuple(shape), high=high, example=example)
        specs.append(replace(spec, mask=mask))
    graph_module.meta["symbols"] = names
    container = isinstance(eager, (dict, list, tuple)) and type(eager) in (dict, list, tuple)
    plain = container or isinstance(eager, torch.Tensor)
    path = None if plain else f"{type(eager).__module__}.{type(eager).__qualname__}"
    return Signature(inputs=tuple(specs), output_class=path, record=None if plain else _record(eager))


def _record(eager: Any) -> type | None:
    """The class of an output that is made of its fields by name; None for a tuple with names."""
    return type(eager) if is_dataclass(eager) or isinstance(eager, Mapping) else None


def _name(base: str, size: int, taken: dict[str, list[int]]) -> str:
    """Another dimension of a kind is "time_1", and so on; one of a batch's size is the batch."""
    sizes = taken.setdefault(base, [])
    # A mask that broadcasts leaves export free to keep a batch of its own; a caller's is one, but where texts are one
    # after the other in a row there are not as many of them as of their words.
    if base == "batch" and size in sizes:
        count = sizes.index(size)
    else:
        count = len(sizes)
        sizes.append(size)
    return base if count == 0 else f"{base}_{count}"


_TABLES = {aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx}

# keep an index what it is, wherever it stands
_SAME_INDEX = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.to.device,
    aten.to.dtype_layout, aten._to_copy.default, aten.alias.default, aten.flatten.using_ints, aten.clamp.default,
    aten.where.self, aten.masked_fill.Scalar, aten.transpose.int, aten.cat.default,
}  # fmt: skip


def _rows_indexed(graph_module: fx.GraphModule, placeholder: fx.Node) -> int | None:
    """The rows of the smallest table that an integer input indexes; None when it indexes none, and where columns of it
    index tables of their own.

    Followed through views, casts and constant offsets alone: a running sum of a mask counts, it is not an index of the
    caller's.
    """
    rows: list[int] = []
    of_columns = False
    front: list[tuple[fx.Node, int, bool]] = [(placeholder, 0, False)]
    seen = set()
    while front:
        node, shift, column = front.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            held = _rows_of(user, node)
            if held is not None:
                rows.append(held - shift)
                of_columns = of_columns or column
            elif user.target in _SAME_INDEX:
                front.append((user, shift, column or user.target is aten.select.int))
            elif user.target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(user.args[1], int):
                more = user.args[1] if user.target is aten.add.Tensor else -user.args[1]
                front.append((user, shift + more, column))
    return None if of_columns and len(set(rows)) > 1 else min(rows, default=None)


def _rows_of(reader: fx.Node, index: fx.Node) -> int | None:
    """How many rows the table has that `reader` indexes by `index`."""
    if reader.target is aten.one_hot.default and reader.args[0] is index:
        classes = argument(reader, 1, "num_classes", -1)
        return classes if isinstance(classes, int) and classes > 0 else None
    dim: int | None = None
    if reader.target in _TABLES and reader.args[1] is index:
        dim = 0
    elif reader.target in (aten.index_select.default, aten.gather.default) and reader.args[2] is index:
        dim = argument(reader, 1, "dim")
    elif reader.target is aten.index.Tensor and index in argument(reader, 1, "indices"):
        dim = list(argument(reader, 1, "indices")).index(index)
    if dim is None or not isinstance(reader.args[0], fx.Node):
        return None
    size = reader.args[0].meta["val"].shape[dim]
    return int(size) if not isinstance(size, torch.SymInt) else None
