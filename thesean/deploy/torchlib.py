"""torch's table of operators and their ONNX forms, read once a process.

`torch.onnx.export` reads the sources of some 500 functions anew in each call: half a second, most of what a small
network's export takes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_MAKE = "from_torchlib"


@contextmanager
def table_kept() -> Iterator[None]:
    """Exports inside take copies of a table that was read once."""
    registry, original = _registry()
    if registry is None:
        yield
        return
    setattr(registry, _MAKE, staticmethod(lambda *args, **settings: _copy(_table(*args, **settings))))
    try:
        yield
    finally:
        setattr(registry, _MAKE, original)


@cache
def _registry() -> tuple[Any, Any]:
    """torch's class and its method as they were; None where a torch has them elsewhere: exports take longer there.

    Until torch keeps the table itself: 2.13 makes one a call, and the public arguments take none.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None, None
    original = vars(ONNXRegistry).get(_MAKE)
    return (ONNXRegistry, original) if isinstance(original, classmethod) else (None, None)


@cache
def _table(*args: Any, **settings: Any) -> Any:
    registry, original = _registry()
    return original.__get__(None, registry)(*args, **settings)


def is_registered(target: Any) -> bool:
    """Whether the table has a form of this operator; True where a torch has its table elsewhere."""
    registry, _ = _registry()
    return registry is None or bool(_table().is_registered(target))


def is_registered_for_complex(target: Any) -> bool:
    """Whether one of its forms takes complex numbers; True where a torch has its table elsewhere."""
    registry, _ = _registry()
    return registry is None or any(form.is_complex for form in _table().functions.get(target.name(), ()))


def _copy(table: Any) -> Any:
    """An export may register operators of its own."""
    new = copy.copy(table)
    for name, value in vars(table).items():
        if isinstance(value, dict):
            setattr(new, name, {key: list(v) if isinstance(v, list) else v for key, v in value.items()})
    return new
