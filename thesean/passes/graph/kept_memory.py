"""The module that stands in a graph for a guide's own recurrence that carries its memory on.

B batch, T time, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

import torch
from torch import nn

from thesean.passes.graph.opaque_memories import Memory, state_of
from thesean.targets.shared.core import Core


class KeptMemory(nn.Module):
    """query_BTHF, key_BTHF, value_BTHK, rates, (state_BHFK) -> out_BTHK, state_BHFK after the last step, as the kernel
    of `memory` has it. It starts as zeros.
    """

    stateful = True

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.reads = len(memory.reads)
        self.core = Core(memory.kernel.__name__)

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = given[self.reads] if len(given) > self.reads else state_of(given[1], given[2])
        out_BTHK, state_BHFK = self.core(*given[: self.reads], state)
        return out_BTHK, state_BHFK
