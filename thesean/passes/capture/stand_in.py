"""What torch.export is given in a guide's place, where it would not take the guide itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from thesean.passes.capture.inputs import own_parameters

# A graph's own attributes, which no module or weight of the guide can be called.
_TAKEN = (set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - set(dir(nn.Module()))) | {"meta"}
_HELD = "guide"
_LEAVES = (torch.Tensor, type(None), bool, int, float, str)


def stand_in(model: nn.Module, names: Sequence[str], eager: Any) -> nn.Module:
    """The model, or where needed another module that shares all with it: one that names what the model takes through
    **kwargs (until torch.export takes dynamic shapes for those: 2.13 compares them with the wrong structure), returns
    dicts for records that torch doesn't know, and holds one whose parts are called as a graph's own attributes.
    """
    held = not _TAKEN.isdisjoint([*model._modules, *model._parameters, *model._buffers])
    unknown = any(_is_record(leaf) for leaf in pytree.tree_leaves(eager))
    if set(names) <= set(own_parameters(model)) and not held and not unknown:
        return model
    made = nn.Module().eval() if held else copy.copy(model)
    if held:
        made.add_module(_HELD, model)
    call = model if held else model.forward

    def forward(**inputs: Any) -> Any:
        output = call(**inputs)
        return plain(output) if unknown else output

    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    made.forward = forward
    return made


def _is_record(value: object) -> bool:
    return isinstance(value, (Mapping, tuple, list)) or (is_dataclass(value) and not isinstance(value, type))


def plain(value: Any) -> Any:
    """Mappings and dataclasses as dicts, sequences as tuples, whatever stands in them."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(plain(v) for v in value)
    if _is_record(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return value


def as_in_the_guide(graph: fx.Graph) -> None:
    """Gives modules that were held the paths that they have in the guide. In place."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (_in_guide(path), kind) for key, (path, kind) in stack.items()}


def _in_guide(path: str) -> str:
    return "" if path == _HELD else path.removeprefix(f"{_HELD}.")


def foreign(value: Any) -> str:
    """The name of the first class in a guide's output that is neither a tensor nor a record of such; "" for none."""
    if _is_record(value):
        inner = value.values() if isinstance(value, Mapping) else plain(value)
        inner = inner.values() if isinstance(inner, Mapping) else inner
        return next((name for name in map(foreign, inner) if name), "")
    return "" if isinstance(value, _LEAVES) else type(value).__name__
