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

    def distinct_rows(self) -> dict[str, torch.Tensor]:
        """The example, but one row of it where all are the same, as where a batch of one was doubled to be traced."""
        if self.signature.within({"batch": 1})["batch"] != 1:
            return self.example
        row = self.signature.first_rows(self.example, 1)
        return row if repeats(self.example, row) else self.example


def repeats(rows: dict[str, torch.Tensor], row: dict[str, torch.Tensor]) -> bool:
    """Whether all rows of a batch are this one."""
    return all(torch.equal(value, row[name].expand_as(value)) for name, value in rows.items())
