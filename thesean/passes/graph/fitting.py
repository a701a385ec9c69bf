"""Whether a graph from a file fits its inputs and weights: every node's shape and dtype, found without their numbers.

The graph runs on torch's meta device, where tensors have shapes and no values. Layers repeat, and so do their
operators: each is run once for the same shapes.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from thesean.errors import ArtifactError
from thesean.passes.graph import unchecked
from thesean.passes.graph.nodes import attribute
from thesean.passes.graph.shapes import Shapes
from thesean.passes.graph.signature import Signature

aten = torch.ops.aten

_SHAPED = {
    aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}  # fmt: skip
_BOUNDED = {aten.slice.Tensor, aten.clamp.default}  # whose outputs are no larger for a larger number
_META = torch.device("meta")
# Sizes multiply where dimensions are flattened. A product of products of them would soon be longer than memory.
_MOST_FACTORS = 8


@dataclass(frozen=True)
class _Outcome:
    """What a call gives for arguments of some shapes: meta tensors, the bytes that are new, whether it is a view."""

    value: Any
    fresh: int
    views: bool


@dataclass
class Fitting:
    """One run on the meta device at `sizes` of the dynamic dimensions. `limit`: bytes that values may take at once."""

    module: nn.Module
    signature: Signature
    sizes: Mapping[str, int]
    limit: int
    kinds: Mapping[str, str] = field(default_factory=dict)  # of the modules: equal ones compute equal shapes
    _known: dict[Any, _Outcome] = field(default_factory=dict)
    _values: dict[fx.Node, Any] = field(default_factory=dict)
    _scalars: dict[fx.Node, torch.Tensor] = field(default_factory=dict)  # tensors that are computed from sizes alone

    @torch.no_grad()
    def run(self, graph: fx.Graph) -> int:
        """The most bytes that values take at once, weights apart. Raises ArtifactError for a node that doesn't fit."""
        names = [n.target for n in graph.find_nodes(op="placeholder")]
        if names != [spec.name for spec in self.signature.inputs]:
            raise ArtifactError(f"graph.json: the graph takes {names}, the signature says otherwise.")
        values = self._values = {}
        fresh: dict[fx.Node, int] = {}
        owners: dict[fx.Node, set[fx.Node]] = {}  # whose memory a node's value is in
        factors: dict[fx.Node, int] = {}
        self._scalars = {}
        with warnings.catch_warnings(), Shapes():
            warnings.simplefilter("ignore")
            for node in graph.nodes:
                if node.op == "output":
                    _check_output(fx.map_arg(node.args[0], values.__getitem__))
                    continue
                factors[node] = _factors(node, factors)
                try:
                    outcome = self._outcome(node, values)
                except ArtifactError:
                    raise
                except Exception as error:  # whatever torch says of arguments that don't fit
                    reason = next(iter(str(error).splitlines()), "")[:300]
                    raise ArtifactError(
                        f"graph.json: node {node.name} ({node.target}) does not fit what it is given: {reason}"
                    ) from error
                if outcome.fresh > self.limit:
                    raise ArtifactError(
                        f"graph.json: node {node.name} ({node.target}) takes {outcome.fresh:,} bytes; at most "
                        f"{self.limit:,} are allowed. Raise max_bytes= for a folder that you trust."
                    )
                values[node], fresh[node] = outcome.value, outcome.fresh
                held = set().union(*(owners[i] for i in node.all_input_nodes)) if outcome.views else set()
                owners[node] = held | {node} if outcome.fresh else held
        return _peak(graph, fresh, owners)

    def _outcome(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> _Outcome:
        if node.op == "placeholder":
            spec = next(s for s in self.signature.inputs if s.name == node.target)
            shape = [self.sizes[d] if isinstance(d, str) else d for d in spec.shape]
            value = torch.empty(shape, dtype=spec.dtype, device=_META)
            return _Outcome(value, value.nbytes, False)
        if node.op == "get_attr":
            return _Outcome(attribute(self.module, str(node.target)), 0, False)
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
            assert callable(node.target)
            return _Outcome(_of_sizes(node.target, args), 0, node.target is operator.getitem)
        if node.target is aten.item.default:
            return _Outcome(self._item(node, args[0]), 0, False)
        kind = self.kinds[str(node.target)] if node.op == "call_module" else node.target
        key = (kind, _described(args), _described(kwargs))
        if key not in self._known:
            target: Any = node.target
            inside = _Inside()
            with inside if node.op == "call_module" else nullcontext():
                result = (self._module if node.op == "call_module" else _operator)(target, args, kwargs)
            outcome = _measured(result, pytree.tree_leaves((args, kwargs)))
            self._known[key] = replace(outcome, fresh=max(outcome.fresh, inside.most))
        self._follow_scalar(node)
        return self._known[key]

    def _follow_scalar(self, node: fx.Node) -> None:
        """Numbers that stand in tensors for a while, on their way to an index: DeBERTa's 128 - min(T, 128)."""
        scalars = self._scalars
        if node.target is aten.scalar_tensor.default:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
            scalars[node] = aten.scalar_tensor.default(*args, **kwargs)
        elif node.op == "call_function" and any(i in scalars for i in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: scalars.get(n, self._values[n]))
            given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if all(t.ndim == 0 and t.device != _META for t in given):
                result = node.target(*args, **kwargs)  # type: ignore[operator]
                if isinstance(result, torch.Tensor) and result.ndim == 0:
                    scalars[node] = result

    def _item(self, node: fx.Node, value: Any) -> int | float | bool:
        """A number that may only bound what is there, or be a factor: sizes must not depend on values."""
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise ArtifactError("graph.json: item is for one number.")
        scalar = next((self._scalars[i] for i in node.all_input_nodes if i in self._scalars), None)
        if scalar is not None and all(user.target in _BOUNDED for user in node.users):
            return scalar.item()
        if not value.is_floating_point():
            raise ArtifactError("graph.json: a size depends on values.")
        return 1.0

    def _module(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _META:
            return self.module.get_submodule(target)(*args, **kwargs)


class _Inside(TorchDispatchMode):
    """The most bytes that a value takes within a module."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as with `Shapes`

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.untyped_storage().nbytes())
        return result


def _operator(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    unchecked.check(target, args, kwargs)
    # whether a view is one hangs on strides, which another device's kernels choose otherwise
    target = _SHAPED.get(target, target)
    args, kwargs = pytree.tree_map_only(torch.device, lambda device: _META, (args, kwargs))
    place = next((i for i, a in enumerate(target._schema.arguments) if a.name == "device"), None)
    if place is not None and (place >= len(args) or target._schema.arguments[place].kwarg_only):
        kwargs = {**kwargs, "device": _META}
    return target(*args, **kwargs)


def _of_sizes(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A Python operator on sizes. Of texts, lists and tensors it would be another one."""
    if function is operator.getitem:
        holder, index = args
        if not isinstance(holder, (tuple, list)) or type(index) is not int:
            raise ArtifactError("graph.json: expected one of several outputs by its number.")
        return holder[index]
    if not all(type(a) in (int, float, bool) for a in args):
        raise ArtifactError(f"graph.json: {function.__name__} is for sizes; found {[type(a).__name__ for a in args]}.")
    result = function(*args)
    if not isinstance(result, float) and abs(result) >= 2**63:
        raise ArtifactError(f"graph.json: a size of {function.__name__} is beyond torch's.")
    return result


def _factors(node: fx.Node, factors: Mapping[fx.Node, int]) -> int:
    """At most how many sizes are multiplied in the size that a node computes."""
    if node.target is aten.sym_size.int:
        return 1
    if node.target is aten.item.default:
        return _MOST_FACTORS + 1
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return 0
    given = [factors[i] if isinstance(i, fx.Node) else 0 for i in node.args]
    most = sum(given) if node.target is operator.mul else max(given, default=0)
    if most > _MOST_FACTORS and node.target is not operator.getitem:
        raise ArtifactError(f"graph.json: the size {node.name} is a product of more than {_MOST_FACTORS} sizes.")
    return most


def _described(value: Any) -> Any:
    """Equal and hashable for arguments that give outputs of equal shapes; True and 1.0 are not 1."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.stride(), value.is_conj(), value.is_neg())
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_described, value))
    if isinstance(value, dict):
        return ("dict", *((k, _described(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", *map(_described, (value.start, value.stop, value.step)))
    return type(value).__name__, repr(value) if isinstance(value, float) else value


def _measured(value: Any, given: Iterable[Any]) -> _Outcome:
    leaves = pytree.tree_leaves(value)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    if any(t.device != _META or t.layout != torch.strided for t in tensors):
        raise ArtifactError("graph.json: a value is not where the network stands.")
    before = {t.untyped_storage()._cdata for t in given if isinstance(t, torch.Tensor)}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    fresh = sum(size for storage, size in storages.items() if storage not in before)
    return _Outcome(value, fresh, not before.isdisjoint(storages))


def _check_output(value: Any) -> None:
    kinds = {type(leaf) for leaf in pytree.tree_leaves(value)}
    if not kinds <= {torch.Tensor, nn.Parameter, int, float, bool, str, type(None)}:
        raise ArtifactError(f"graph.json: an output holds {sorted(k.__name__ for k in kinds)}; expected tensors.")


def _peak(graph: fx.Graph, fresh: Mapping[fx.Node, int], owners: Mapping[fx.Node, set[fx.Node]]) -> int:
    """The most bytes that are held at once: of what a later node reads, or a view of it."""
    nodes = list(graph.nodes)
    last: dict[fx.Node, int] = {}
    for at, node in enumerate(nodes):
        for read in (node, *node.all_input_nodes):
            for owner in owners.get(read, ()):
                last[owner] = at
    gone: dict[int, int] = {}
    for owner, at in last.items():
        gone[at] = gone.get(at, 0) + fresh[owner]
    held = most = 0
    for at, node in enumerate(nodes):
        held += fresh.get(node, 0)
        most = max(most, held)
        held -= gone.get(at, 0)
    return most
