"""Half precision computed in float32: what is probed has digits to be compared by, whatever the guide's weights are.

Only what is computed is widened, operator by operator: never all weights at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from thesean.kernels.shared.precision import HALF


def widened(value: Any) -> Any:
    """Tensors of half precision in float32, nested ones too; all else as it is."""
    return map_aggregate(value, _wide)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF else value
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def compute_wide(node: fx.Node, look_up: Callable[[fx.Node], Any]) -> Any:
    """A called function's value where `look_up` gives widened inputs: what the graph casts down stays wide."""
    assert callable(node.target)
    args: Any = fx.map_arg(map_aggregate(node.args, _wide), look_up)
    kwargs: Any = fx.map_arg(map_aggregate(node.kwargs, _wide), look_up)
    return node.target(*args, **kwargs)


def call_wide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A called module's value, widened: it computes in its own precision."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def narrowed(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(own) if floats and own in HALF else value

    return widened(module(*map_aggregate(args, narrowed), **map_aggregate(kwargs, narrowed)))


def is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def same_memory(a: Any, b: Any) -> bool:
    """Whether one is a view of the other."""
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )
