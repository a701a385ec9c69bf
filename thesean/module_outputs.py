"""The outputs of a model's modules, taken as they are made.

N examples, P width
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from thesean.distill.data import LABELS
from thesean.errors import DataError, NumericalError, UnknownNameError


def select_modules(
    model: nn.Module,
    globs: str | Sequence[str] | None,
    option: str,
    aliases: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[str]:
    """The names of the modules that the globs match, in the model's order; `*` is within a level, `**` any levels.

    A glob may as well match one of a module's `aliases`, with what is below it. Without globs the blocks of the
    outermost nn.ModuleList, or every module with weights of its own. Raises UnknownNameError for a glob that none
    matches, DataError where there is nothing to choose.
    """
    made = [name for name, m in model.named_modules() if isinstance(m, ParametrizationList)]
    weights = tuple(f"{name.rpartition('.')[0]}." for name in made)
    # what makes a weight, as a weight norm does, has no outputs of examples
    modules = {n: m for n, m in model.named_modules() if n and not f"{n}.".startswith(weights)}
    if isinstance(model, fx.GraphModule):
        # what is no target module has become operators of the graph: only modules that it calls have outputs
        called = [str(node.target) for node in model.graph.find_nodes(op="call_module")]
        modules = {n: m for n, m in modules.items() if any(n == c or n.startswith(f"{c}.") for c in called)}
        if not called:
            raise DataError(
                f"{option}: nothing of this network was replaced, and what it keeps of its guide is a graph without "
                "modules. Compare the guide itself."
            )
        if globs is None:
            return list(dict.fromkeys(called))
    if globs is None:
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        found = [f"{name}.{child}" for name in outer for child, _ in modules[name].named_children()]
        found = found or [name for name, module in modules.items() if list(module.parameters(recurse=False))]
        if not found:
            raise DataError(f"{option}: {type(model).__name__} has no modules with weights. Name some modules.")
        return found
    chosen: set[str] = set()
    for glob in [globs] if isinstance(globs, str) else globs:
        matching = {
            name
            for name in modules
            if any(_matches(known.split("."), glob.split(".")) for known in _names(name, aliases))
        }
        if not matching:
            told = [" = ".join(reversed(_names(name, aliases)[:2])) for name in modules]
            some = ", ".join(told[:12]) + (", ..." if len(told) > 12 else "")
            whose = "the converted network" if aliases else type(model).__name__
            raise UnknownNameError(f"{option}: no module of {whose} matches {glob!r}. It has: {some}")
        chosen |= matching
    return [name for name in modules if name in chosen]


def _names(name: str, aliases: Mapping[str, Sequence[str]]) -> list[str]:
    """The module's own name and the others that it goes by."""
    root, dot, below = name.partition(".")
    return [name, *(f"{alias}{dot}{below}" for alias in aliases.get(root, ()))]


def _matches(levels: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not levels
    if patterns[0] == "**":
        return any(_matches(levels[skip:], patterns[1:]) for skip in range(len(levels) + 1))
    return bool(levels) and fnmatchcase(levels[0], patterns[0]) and _matches(levels[1:], patterns[1:])


@torch.no_grad()
def module_outputs(
    model: nn.Module, names: Sequence[str], batch: Any, keep: Callable[[torch.Tensor], Any]
) -> dict[str, Any]:
    """Run `batch` through the model and return `keep(output)` of each layer, by name.

    Of a module that runs more than once the later runs are name#2, name#3; of several outputs the first floating tensor
    counts. Raises DataError for a module that did not run or has no tensor, and what `keep` raises, with the layer.
    """
    outputs: dict[tuple[int, int], tuple[str, Any]] = {}
    handles = []

    def hook(place: int, name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            times = sum(1 for known, _ in outputs if known == place) + 1
            tensor = _first_tensor(output)
            if tensor is None:
                raise DataError(f"{name}: expected a floating tensor as output, found {type(output).__name__}.")
            try:
                kept = keep(tensor)
            except (DataError, NumericalError) as error:
                raise type(error)(f"{name}: {error}") from error
            outputs[place, times] = (name if times == 1 else f"{name}#{times}", kept)

        return record

    try:
        for place, name in enumerate(names):
            handles.append(model.get_submodule(name).register_forward_hook(hook(place, name)))
        arguments, keywords = _arguments(model, batch)
        model(*arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    idle = sorted(set(range(len(names))) - {place for place, _ in outputs})
    if idle:
        raise DataError(f"{names[idle[0]]}: the model's forward never called it. Leave it out of the layers.")
    return dict(outputs[key] for key in sorted(outputs))


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch as the model's forward takes it, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, torch.Tensor):
        return (moved(batch),), {}
    if isinstance(batch, (tuple, list)):
        return tuple(moved(value) for value in batch), {}
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        taken = {
            k: moved(v) for k, v in batch.items() if (k in parameters or anything) and k not in LABELS
        }  # they would make a model compute its loss
        if not taken:
            raise DataError(f"{type(model).__name__} takes none of: {', '.join(map(str, batch))}.")
        return (), taken
    raise DataError(f"expected a tensor, a tuple or a dict, found {type(batch).__name__}.")
