"""compile and plan trace equal guides once a process: what most tests pay for is the same small guide, made anew.

Equal is what pickles to the same bytes: class, weights, buffers, flags, configuration and every other attribute, and so
the inputs. All else is traced, and so is everything that calls `capture` by itself, as the tests of it do.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from thesean.passes.capture import capture as captures
from thesean.passes.capture.captured import Captured
from thesean.passes.graph import dump

_LARGEST = 30_000_000  # parameters: beyond, comparing and copying takes as long as a trace


class _Described(pickle.Pickler):
    """Tensors by their values: torch's own way writes addresses."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        data = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        about = (type(value), value.dtype, tuple(value.shape), value.stride(), value.requires_grad, str(value.device))
        return tuple, ((*about, data),)


def described(*values: Any) -> bytes | None:
    """Equal for equal values, whatever their identity; None for what can't be described."""
    written = io.BytesIO()
    try:
        _Described(written).dump(values)
    except Exception:
        return None
    return hashlib.sha256(written.getvalue()).digest()


class KeptCaptures:
    """`capture` with a memory. What it gives is the caller's own, and shares parameters with the caller's guide."""

    def __init__(self, capture: Callable[..., Captured]) -> None:
        self.capture = capture
        self.kept: dict[bytes, tuple[nn.Module, Captured]] = {}

    def __call__(self, model: nn.Module, example_inputs: Any, dynamic: Any = None) -> Captured:
        small = isinstance(model, nn.Module) and sum(p.numel() for p in model.parameters()) < _LARGEST
        key = described(model, example_inputs, dynamic) if small and dump._active.get() is None else None
        if key in self.kept:
            return _bound(*self.kept[key], model)
        captured = self.capture(model, example_inputs, dynamic)
        if key is not None and _all_of(model, captured.graph_module):
            guide, graph_module = copy.deepcopy((model, captured.graph_module))
            self.kept[key] = guide, replace(captured, graph_module=graph_module, example=_clones(captured.example))
        return captured


def _all_of(model: nn.Module, graph_module: fx.GraphModule) -> bool:
    """Whether the graph has no parameter that the guide doesn't show: one in a list could not be found again."""
    own = {id(p) for p in model.parameters()}
    return all(id(p) in own for p in graph_module.parameters())


def _bound(guide: nn.Module, captured: Captured, model: nn.Module) -> Captured:
    """A copy of `guide`'s capture on the parameters and buffers of its equal, `model`."""
    memo: dict[int, Any] = {}
    for kind in ("named_parameters", "named_buffers"):
        theirs, ours = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (guide, model))
        memo.update({id(tensor): ours[name] for name, tensor in theirs.items()})
    return replace(captured, graph_module=copy.deepcopy(captured.graph_module, memo), example=_clones(captured.example))


def _clones(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in inputs.items()}


capture = KeptCaptures(captures.capture)  # one memory for all tests of a process
