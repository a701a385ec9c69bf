"""What a module's code keeps in Python between two calls: counters, lists, caches, a table that it makes anew."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_DEEPEST = 4  # containers and objects within each other that are followed

_BUFFERS = "_buffers"  # restored with the rest; told by who looks after them

# What holds no state of a module's own: code, and what is kept otherwise.
_NO_HOLDER = (nn.Module, torch.Tensor, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


class KeptAttributes:
    """All attributes of a module and of those inside as they were: which objects they held, and what those held.

    Parameters and buffers are not looked into, nor what is deeper than a few levels.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, torch.Tensor, int, torch.Tensor]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            self._keep(path, vars(module), seen, 0)

    def _keep(self, path: str, holder: Any, seen: set[int], depth: int) -> None:
        if id(holder) in seen or depth > _DEEPEST:
            return
        seen.add(id(holder))
        self._kept.append((path, holder, copy.copy(holder)))
        for name, value in _entries(holder):
            if depth == 0 and name in ("_parameters", _BUFFERS):
                seen.update(id(v) for v in value.values())
            hidden = name.startswith("_") and name != _BUFFERS
            where = _joined(path, "" if hidden and depth == 0 else name)
            if isinstance(value, torch.Tensor):
                if id(value) not in seen and not isinstance(value, nn.Parameter) and not value.is_inference():
                    seen.add(id(value))
                    self._tensors.append((where, value, value._version, value.detach().clone()))
            elif inner := _holder_of(value):
                self._keep(where, inner[0], seen, depth + 1)

    def changed(self) -> list[str]:
        """Paths of attributes that hold something else by now: another number, not the same one anew."""
        found = dict.fromkeys(
            _joined(path, name)
            for path, holder, before in self._kept
            if path.rpartition(".")[2] != _BUFFERS
            for name in _different(before, holder)
        )
        for path, tensor, version, before in self._tensors:
            if tensor._version != version and not _alike(tensor, before):
                found[path] = None
        return list(found)

    @torch.no_grad()
    def restore(self) -> None:
        """All as it was. What didn't change isn't touched."""
        for _, holder, before in self._kept:
            if not _same_entries(before, holder):
                _refill(holder, before)
        for _, tensor, version, before in self._tensors:
            if tensor._version != version and not _alike(tensor, before):
                tensor.copy_(before)


def _holder_of(value: Any) -> tuple[Any] | None:
    """What the value keeps its own in, where it is something that can change."""
    if isinstance(value, (dict, list, set, deque)):
        return (value,)
    if isinstance(value, _NO_HOLDER) or not isinstance(getattr(value, "__dict__", None), dict):
        return None
    return (vars(value),)


def _entries(holder: Any) -> Iterator[tuple[str, Any]]:
    yield from ((str(k), v) for k, v in holder.items()) if isinstance(holder, dict) else (("", v) for v in holder)


def _joined(path: str, name: str) -> str:
    return ".".join(p for p in (path, name) if p)


def _same_entries(before: Any, after: Any) -> bool:
    """Whether the very same objects are held."""
    if len(before) != len(after):
        return False
    if isinstance(before, dict):
        return all(k in after and after[k] is v for k, v in before.items())
    if isinstance(before, (set, frozenset)):
        return bool(before == after)
    return all(a is b for a, b in zip(before, after, strict=True))


def _different(before: Any, after: Any) -> Iterator[str]:
    """The names of entries that changed; "" for those of a list."""
    if isinstance(before, dict):
        for name in before.keys() | after.keys():
            if name not in before or name not in after or not _alike(before[name], after[name]):
                yield str(name)
    elif not _same_entries(before, after) and not _alike(before, after):
        yield ""


def _alike(a: Any, b: Any, depth: int = 0) -> bool:
    """Whether two values are the same by what they hold."""
    if a is b or depth > _DEEPEST:
        return True
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return both and a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(v, b[k], depth + 1) for k, v in a.items())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(_alike(x, y, depth + 1) for x, y in zip(a, b, strict=True))
    try:
        if bool(a == b):
            return True
    except Exception:  # a class of the caller's
        return False
    one, other = _holder_of(a), _holder_of(b)
    return one is not None and other is not None and one[0] is not a and _alike(one[0], other[0], depth + 1)


def _refill(holder: Any, before: Any) -> None:
    holder.clear()
    (holder.extend if isinstance(holder, (list, deque)) else holder.update)(before)
