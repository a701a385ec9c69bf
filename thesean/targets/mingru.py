"""A gated linear recurrence: gates read the input alone, so training runs all steps in parallel.

B batch, T time, D width of the part, E units per direction
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.copying import copy_value
from thesean.targets.shared.core import Core
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.lookahead import Late, LaterSteps, read_later
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceTarget,
    SmallLinear,
    WidthOptions,
    check_sequence,
    sequence_frame,
)
from thesean.targets.shared.steps import Steps, flip, hide


class MinGRU(SequenceTarget):
    """h_t = (1 - z_t) h_{t-1} + z_t v_t, y_t = last(h_t * silu(g_t)); z, v and g are affine in x_t.

    Feng et al. 2024, section 3.1; the output gate g is ours. x_BTD, state_BE -> (y_BTD, state_BE). Bidirectional: half
    of the units read the sequence backwards.
    """

    family = "mingru"
    reads_mask = True
    looks_ahead = True
    saved = ("width",)

    def __init__(
        self,
        *,
        width: int,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        self.width = width
        units = self.directions * width
        self.gate = nn.Linear(self.width_in, units)
        self.value = nn.Linear(self.width_in, units)
        self.output_gate = nn.Linear(self.width_in, units)
        self.core = Core("linear_recurrence")
        self.later = LaterSteps(width, self.lookahead) if self.lookahead else None
        self.last = SmallLinear(units, self.width_out)
        self.reset_projections()

    @torch.no_grad()
    def reset_projections(self) -> None:
        for linear in (self.gate, self.value, self.output_gate):
            nn.init.normal_(linear.weight, std=0.7 * self.width_in**-0.5)
        # sigmoid(-5..2): memories of 150 steps down to 1. Permuted, because neighbouring units are often one head.
        for bias in self.gate.bias.split(self.width):
            bias.copy_(torch.linspace(-5, 2, self.width)[torch.randperm(self.width)])
        nn.init.zeros_(self.value.bias)
        nn.init.ones_(self.output_gate.bias)  # open at the start

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.width)

    def mix(
        self, x_BTD: torch.Tensor, state: torch.Tensor | None, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate = self.gate(x_BTD)
        # sigmoid(-gate), not 1 - sigmoid(gate): keeps its digits where the gate is nearly open
        decay, update = torch.sigmoid(-gate), torch.sigmoid(gate) * self.value(x_BTD)
        decay, update = hide(decay, steps, 1.0), hide(update, steps)
        if state is not None:
            hidden_BTE, state = self.core(decay, update, state)
        else:
            decay_ahead, decay_back = decay.split(self.width, -1)
            update_ahead, update_back = update.split(self.width, -1)
            start_BE = self.core_state(x_BTD)
            ahead_BTE, _ = self.core(decay_ahead, update_ahead, start_BE)
            back_BTE, _ = self.core(flip(decay_back, steps), flip(update_back, steps), start_BE)
            hidden_BTE = torch.cat([ahead_BTE, flip(back_BTE, steps)], -1)
        hidden_BTE = read_later(self.later, hidden_BTE, late)
        own_BTD = x_BTD if late is None else late(x_BTD)
        return hidden_BTE * F.silu(self.output_gate(own_BTD)), state

    @property
    def late_width(self) -> int:
        return self.width + self.width_in

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """The guide's value projection, as many whole copies as fit; nothing where the part has no attention."""
        return ("value",) if copy_value(self.value, part) else ()


def build(part: PartFacts, options: WidthOptions) -> MinGRU:
    return MinGRU(width=options.features_width(part), **sequence_frame(part, options))


TARGET = Family(
    name="mingru",
    summary="gated linear recurrence, trained in parallel over time; no positions inherited from the guide",
    options=WidthOptions,
    module=MinGRU,
    build=build,
    scope="mixing",
    check=lambda part, options: check_sequence("mingru", part),
)
