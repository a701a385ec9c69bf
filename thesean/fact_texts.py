"""Texts of values, the same for equal ones in another process: functions by their source and by what they were made
with, not by where they lie.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from thesean.distill.stream import hash_of
from thesean.targets import Target

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEP = 4  # functions that are made with functions


def text_of(value: Any) -> str:
    """Of settings, in which functions are as their source has them."""
    if isinstance(value, Target):
        return f"Target({', '.join(f'{k}={text_of(v)}' for k, v in vars(value).items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{text_of(k)}: {text_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return _source(inspect.unwrap(value)) if callable(value) else repr(value)


def text_of_values(values: Any) -> str:
    """Of nested batches or rows: tensors, arrays and images by their bytes."""
    return hashed(map(_leaf, pytree.tree_leaves(values)))


def _leaf(leaf: Any) -> bytes:
    if isinstance(leaf, torch.Tensor):
        return hash_of([leaf]).encode()
    if isinstance(leaf, _PLAIN):
        return repr(leaf).encode("utf-8", "surrogatepass")
    if callable(getattr(leaf, "tobytes", None)) and str(getattr(leaf, "dtype", "")) != "object":  # else of pointers
        return f"{type(leaf).__qualname__}{getattr(leaf, 'shape', '')}".encode() + bytes(leaf.tobytes())
    return type(leaf).__qualname__.encode()


def made_with(value: Any, deep: int = _DEEP) -> str:
    """Of a function or an object that is called: what its source doesn't tell (values that it closes over or has by
    default, attributes), and of that what can't change while it is called. A history that it writes is no setting.
    """
    if isinstance(value, partial):
        return _settings([value.func, *value.args, *value.keywords.items()], deep)
    own = inspect.unwrap(value)
    owner = own if not inspect.isroutine(own) else getattr(own, "__self__", None)
    made = [c.cell_contents for c in getattr(own, "__closure__", None) or () if _filled(c)]
    made += [*(getattr(own, "__defaults__", None) or ()), *(getattr(own, "__kwdefaults__", None) or {}).items()]
    made += getattr(getattr(own, "__code__", None), "co_consts", ())  # two in one line have one source
    if isinstance(owner, nn.Module):
        made += [hash_of(owner.state_dict().values()), *(_attributes(m) for m in owner.modules())]
    elif not (owner is None or inspect.ismodule(owner) or inspect.isclass(owner)):
        made += [_attributes(owner)]
    return _settings(made, deep)


def _attributes(value: Any) -> tuple[Any, ...]:
    """Of an object: those that are meant to be set."""
    named = getattr(value, "__dict__", {})
    return (type(value).__qualname__, *((k, v) for k, v in named.items() if k[:1] != "_" and k != "training"))


def _settings(made: Iterable[Any], deep: int) -> str:
    """Of what doesn't change in place; of all else its type."""
    found = []
    for value in made:
        if isinstance(value, _PLAIN):
            found.append(repr(value))
        elif isinstance(value, torch.Tensor):
            found.append(hash_of([value]))
        elif isinstance(value, (tuple, frozenset)):
            inner = [_settings([v], deep) for v in value]
            found.append(f"({', '.join(sorted(inner) if isinstance(value, frozenset) else inner)})")
        elif callable(value) and deep:
            found.append(f"{_source(inspect.unwrap(value))}({made_with(value, deep - 1)})")
        else:
            found.append(type(value).__qualname__)
    return ", ".join(found)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False


def _source(value: Any) -> str:
    """Of an object that is called, its class's; of what was typed in, what it was compiled to."""
    if isinstance(value, partial):
        return f"partial of {_source(inspect.unwrap(value.func))}"
    for what in (value, type(value)):
        with suppress(OSError, TypeError):
            return hashed([inspect.getsource(what)])
    code = getattr(getattr(value, "__code__", None), "co_code", b"")
    named = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '')}.{named}{hashed([code]) if code else ''}"


def hashed(pieces: Iterable[str | bytes]) -> str:
    """Of all, each told from the next one."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update((piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogatepass")) + b"\0")
    return found.hexdigest()
