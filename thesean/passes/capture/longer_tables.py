"""Rotary tables that a guide makes anew for sequences past the length that it was trained for (NTK by length, Peng et
al. 2023): it branches on values, which no graph can. Up to that length they are the plain ones.

T time
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from thesean.errors import CaptureError

# Of transformers' rotary modules: of which kind the table is (or each of several), and up to which length it stays
_KIND, _LONGEST, _CHANGING, _PLAIN = "rope_type", "original_max_seq_len", "dynamic", "default"


def steady_up_to(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int | None:
    """The length up to which all its tables stay what they are; None where none changes. Raises CaptureError for inputs
    that are longer.
    """
    longest = min((getattr(module, _LONGEST) for module in _changing(model)), default=None)
    length = max((value.shape[1] for value in inputs.values() if value.ndim in (2, 3)), default=0)
    if longest is not None and length > longest:
        raise CaptureError(
            f"the guide's rotary tables hang on the length past {longest} steps (rope_type {_CHANGING!r}), found "
            f"example inputs of {length}: no graph makes a table by a length's value. Give some of {longest} at most."
        )
    return longest


@contextmanager
def tables_kept(model: nn.Module) -> Iterator[None]:
    """Inside, tables are those that the modules have."""
    before = [(module, getattr(module, _KIND)) for module in _changing(model)]
    for module, kind in before:
        setattr(module, _KIND, {k: _plain(v) for k, v in kind.items()} if isinstance(kind, dict) else _plain(kind))
    try:
        yield
    finally:
        for module, kind in before:
            setattr(module, _KIND, kind)


def length_guards(graph_module: fx.GraphModule, longest: int) -> tuple[Any, ...]:
    """T <= longest, of each length: what was taken for granted, as torch.export tells its own guards."""
    names: dict[str, str] = graph_module.meta["symbols"]
    sizes = [d for n in graph_module.graph.find_nodes(op="placeholder") for d in n.meta["val"].shape]
    symbols = dict.fromkeys(d.node.expr for d in sizes if isinstance(d, torch.SymInt))
    return tuple(s <= longest for s in symbols if not names.get(str(s), "batch").startswith("batch"))


def _changing(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, _LONGEST, None), int) and _CHANGING in str(getattr(module, _KIND, ""))
    ]


def _plain(kind: str) -> str:
    return _PLAIN if _CHANGING in kind else kind
