"""A captured guide: its graph, its calling convention, and the inputs that it was traced with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.signature import Signature


@dataclass(frozen=True, kw_only=True)
class Captured:
    """`graph_module` shares its parameters with the guide; `example` are the inputs that it was traced with.

    `notes` are what a person should know of it; `untrainable` says why training it is not training the guide, "" where
    it is. `guards`: what the trace took for granted of sizes, conditions in the graph's own symbols.
    """

    graph_module: fx.GraphModule
    signature: Signature
    example: dict[str, torch.Tensor]
    untrainable: str = ""
    notes: tuple[str, ...] = ()
    guards: tuple[Any, ...] = ()
