"""A rank's own rows of a batch, and what is gathered of the rows of all: see thesean/ranks.py.

Alone, a process has all rows, and nothing here does anything.

B batch, T time
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean import exchange, ranks
from thesean.distill.outputs import Outputs, named_leaves
from thesean.errors import DataError
from thesean.passes.graph.nodes import named_dim


class Gathered:
    """Knows by the guide's graph along which dimension the rows of a batch lie."""

    def __init__(self, guide: fx.GraphModule) -> None:
        self.guide = guide
        self._named = {n.name: n for n in guide.graph.nodes}

    @cached_property
    def _input_dims(self) -> dict[str, int]:
        placeholders = self.guide.graph.find_nodes(op="placeholder")
        return {str(n.target): d for n in placeholders if (d := self._dim(n)) is not None}

    def rows(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """How many a batch has; 1 where all batches have as many."""
        return next((inputs[name].shape[dim] for name, dim in self._input_dims.items()), 1)

    def own(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's rows. Raises DataError where there are none for it."""
        if ranks.count() == 1:
            return inputs
        dims = self._input_dims
        if not dims:
            raise DataError(
                f"{ranks.count()} processes share the rows of each batch, and the guide was captured for batches of "
                "one size. Say what is free, dynamic={...: {0: 'batch'}}, or convert in one process."
            )
        found = dict(inputs)
        for name, dim in dims.items():
            length = inputs[name].shape[dim]
            if length < ranks.count():
                raise DataError(
                    f"a batch of {length} rows can't be shared by {ranks.count()} processes: give larger batches "
                    "(drop_last=True of a DataLoader), or launch fewer."
                )
            own = ranks.own_rows(length)
            found[name] = inputs[name].narrow(dim, own.start, own.stop - own.start)
        return found

    def some_rows(self, output: Any, count: int, start: int = 0) -> Any:
        """Of an output of a batch, what some of its rows make of it, as views; None where that can't be told."""
        nodes = list(named_leaves(self.guide.graph.output_node().args[0], fx.Node).values())
        values, nested = pytree.tree_flatten(output)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        if len(tensors) != len(nodes) or not all(self._by_rows(node) for node in nodes):
            return None
        few = [v[start : start + count] if isinstance(v, torch.Tensor) else v for v in values]
        return pytree.tree_unflatten(few, nested)

    def _by_rows(self, node: fx.Node) -> bool:
        """Whether a node's value has a row for each of a batch, before all else."""
        value, symbols = node.meta.get("val"), self.guide.meta["symbols"]
        return isinstance(value, torch.Tensor) and value.ndim > 0 and named_dim(value.shape[0], symbols) == "batch"

    def values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Of the guide's nodes, by name."""
        if ranks.count() == 1:
            return values
        return {name: self._of(self._named[name], value, "examples") for name, value in values.items()}

    def at(self, name: str, value: Any, rank: int) -> Any:
        """The value of one of the guide's nodes on all rows, at this rank; others have their own rows."""
        dim = self._dim(self._named[name])
        return value if dim is None else exchange.gather(value, dim, "ends", to=rank)

    def output(self, output: Any) -> Any:
        """The guide's output or one like it, whole."""
        return self._output(output, ())

    def given(self, function: Any, output: Any) -> Any:
        """What a loss or metric is given of an output: all rows, unless it takes a rank's own."""
        return output if getattr(function, "by_rows", False) else self.output(output)

    def outputs(
        self, outputs: Outputs, output: Any, guide: Any, masks: Mapping[str, torch.Tensor]
    ) -> tuple[Any, Any, Mapping[str, torch.Tensor]]:
        """What `Outputs.distance` is given of a hybrid's output, the guide's and their masks: of classes this rank's
        own rows, for that distance is a mean over rows; all else whole.
        """
        if ranks.count() == 1:
            return output, guide, masks
        own = {name for name, kind in outputs.kinds.items() if kind in ("softmax", "sigmoid")}
        whole = {name: mask if name in own else exchange.gather(mask) for name, mask in masks.items()}
        return self._output(output, own), self._output(guide, own), whole

    def _output(self, output: Any, kept: Container[str]) -> Any:
        """With the outputs of these names as they are."""
        if ranks.count() == 1:
            return output
        named = named_leaves(self.guide.graph.output_node().args[0], fx.Node)
        nodes = iter([None if name in kept else node for name, node in named.items()])
        values, nested = pytree.tree_flatten(output)
        made = [self._of(next(nodes), v, "outputs") if isinstance(v, torch.Tensor) else v for v in values]
        return pytree.tree_unflatten(made, nested)

    def _of(self, node: Any, value: Any, kind: str) -> Any:
        if not isinstance(node, fx.Node) or not isinstance(value, torch.Tensor):
            return value
        dim = self._dim(node)
        return value if dim is None else exchange.gather(value, dim, kind)

    def _dim(self, node: fx.Node) -> int | None:
        """The dimension of a node's value whose size is the batch's, or grows with it."""
        value, symbols = node.meta.get("val"), self.guide.meta["symbols"]
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if re.search(r"\bbatch\b", str(named_dim(size, symbols))):
                return dim
        return None
