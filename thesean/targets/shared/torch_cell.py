"""The frame around torch's own recurrent cells (nn.RNN, nn.GRU, nn.LSTM): one layer, one or two directions.

B batch, T time, D width of the part, O of what it gives, E units per direction, S units kept, G gates
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from thesean.errors import NumericalError
from thesean.targets.shared.facts import CellFacts, PartFacts
from thesean.targets.shared.lookahead import InPlace, Late, LaterSteps, read_later
from thesean.targets.shared.select_features import FeatureMoments, fold, moments, select_features
from thesean.targets.shared.sequence import SequenceFrame, SequenceTarget, SmallLinear
from thesean.targets.shared.steps import Steps


class CellTarget(SequenceTarget):
    """last(cell(x)). A subclass names its cell and spreads its initial weights."""

    saved = ("width",)
    reads_mask = True
    looks_ahead = True
    cell: type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]

    def __init__(
        self,
        *,
        width: int,
        **frame: Unpack[SequenceFrame],
    ) -> None:
        super().__init__(**frame)
        self.width = width
        self.core = self.cell(self.width_in, width, batch_first=True, bidirectional=self.bidirectional)
        self.later = LaterSteps(width, self.lookahead) if self.lookahead else None
        self.last = SmallLinear(self.directions * width, self.width_out)
        self.reset_core()

    @torch.no_grad()
    def reset_core(self) -> None:
        """Set the core's initial weights."""
        raise NotImplementedError(f"{type(self).__name__}.reset_core")

    def core_state(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.width)

    def mix(
        self, x_BTD: torch.Tensor, state: torch.Tensor | None, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # torch wants the layers first: (1, B, E)
        features_BTE, last_1BE = run_cell(self.core, x_BTD, None if state is None else state.unsqueeze(0), steps)
        return read_later(self.later, features_BTE, late), None if state is None else last_1BE.squeeze(0)

    @property
    def late_width(self) -> int:
        return self.width

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """The guide's own cell, where it is of the same kind and has as many units or more: of more of them those whose
        weights' norms are the largest, a guess without data. A module that reads no later step takes what reads none.
        """
        facts = part.cell
        if facts is None or not self._fits(facts):
            return ()
        sizes = self._read_sizes(facts)
        self._keep(facts, [size_E.topk(self.width).indices.sort().values for size_E in sizes])
        return ("cell",)

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Choose the units that tell most of all hidden states, each as much as gates and output read it, and fold the
        others into both by ridge regression, on the guide's inputs of the part. A choice by what the gates make of them
        alone counts on errors that don't come back, and a recurrence reads its own (benchmarks, `narrow_cells`).

        Raises NumericalError where the hidden states are not finite.
        """
        facts = part.cell
        if facts is None or not self._fits(facts) or self.width == facts.units or not examples:
            return
        try:
            known = moments(facts.hidden(x_BTD) for x_BTD, _ in examples)
        except ValueError as error:
            raise NumericalError(f"{part.path}: can't choose units, {error}. Look for NaN in the data.") from error
        kept = []
        for number, size_E in enumerate(self._read_sizes(facts)):
            own = _of_direction(known, number, facts.units)
            kept.append(select_features(own.covariance_EE, torch.diag(size_E), self.width))
        self._keep(facts, kept, known)

    def _read_sizes(self, facts: CellFacts) -> list[torch.Tensor]:
        """By how large weights each unit of a direction is read, by the gates and by the output."""
        read_OE = facts.read_by(self.width_out).weight_OI.split(facts.units, 1)
        return [
            torch.cat([weights.hidden_GEE, own_OE.to(weights.hidden_GEE)]).norm(dim=0)
            for weights, own_OE in zip(facts.weights, read_OE, strict=True)
        ]

    def _fits(self, facts: CellFacts) -> bool:
        alike = facts.kind == self.family and self.directions <= len(facts.weights)
        same = facts.weights[0].input_GEI.shape[1] == self.width_in and facts.units >= self.width
        return alike and same and self.norm is None and not self.residual

    def _keep(self, facts: CellFacts, kept: Sequence[torch.Tensor], known: FeatureMoments | None = None) -> None:
        """These units of each direction; `known` are the moments of all, by which the others are folded in."""
        read, units = facts.read_by(self.width_out), facts.units
        for number, (weights, kept_S) in enumerate(zip(facts.weights[: self.directions], kept, strict=False)):
            gates = len(weights.hidden_GEE) // units
            rows = torch.cat([kept_S + gate * units for gate in range(gates)])
            hidden_GE, bias_GE = weights.hidden_GEE[rows], weights.hidden_bias_GE[rows]
            if known is None:
                hidden_GS = hidden_GE[:, kept_S]
            else:
                hidden_GS, added_GE = fold(_of_direction(known, number, units), hidden_GE, kept_S)
                bias_GE = bias_GE + added_GE.to(bias_GE)
            ending = f"l0{'_reverse' if number else ''}"
            given = (weights.input_GEI[rows], hidden_GS, weights.input_bias_GE[rows], bias_GE)
            for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), given, strict=True):
                getattr(self.core, f"{name}_{ending}").copy_(value)
        all_S = torch.cat([kept_S + number * units for number, kept_S in enumerate(kept)])
        weight_OS, bias_O = read.weight_OI[:, all_S], read.bias_O
        if known is not None:
            weight_OS, added_O = fold(known, read.weight_OI, all_S)
            bias_O = bias_O + added_O.to(bias_O)
        self.last.weight.copy_(weight_OS[:, : self.directions * self.width])
        self.last.bias.copy_(bias_O)


def _of_direction(known: FeatureMoments, number: int, units: int) -> FeatureMoments:
    at_E = slice(number * units, (number + 1) * units)
    return FeatureMoments(known.count, known.mean_E[at_E], known.covariance_EE[at_E, at_E])


def run_cell(
    cell: nn.RNN | nn.GRU | nn.LSTM, x_BTD: torch.Tensor, start: Any, steps: Steps | None
) -> tuple[torch.Tensor, Any]:
    """The cell's outputs and last state, each row read up to its last token; what a cell was lowered to takes the
    lengths as they are.
    """
    if steps is None:
        return cell(x_BTD, start)
    if isinstance(steps, InPlace):
        before_1BE = start[0] if isinstance(start, tuple) else start
        return steps.over_tokens(lambda x, steps: _run_rows(cell, x, start, steps), x_BTD, before_1BE.squeeze(0))
    return _run_rows(cell, x_BTD, start, steps)


def _run_rows(
    cell: nn.RNN | nn.GRU | nn.LSTM, x_BTD: torch.Tensor, start: Any, steps: Steps | None
) -> tuple[torch.Tensor, Any]:
    """Tokens first."""
    if steps is None or x_BTD.is_meta:  # no numbers, no lengths to pack by: shapes are those of whole rows
        return cell(x_BTD, start)
    if not isinstance(cell, nn.RNNBase):
        return cell(x_BTD, start, steps.count_B)
    lengths_B = steps.count_B.clamp_min(1)  # torch packs no empty row
    packed = pack_padded_sequence(x_BTD, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
    packed, last = cell(packed, start)
    features_BTE, _ = pad_packed_sequence(packed, batch_first=True, total_length=x_BTD.shape[1])
    if start is None:
        return features_BTE, last
    empty_1B1 = (steps.count_B == 0).view(1, -1, 1)
    if isinstance(last, tuple):
        return features_BTE, tuple(torch.where(empty_1B1, old, new) for old, new in zip(start, last, strict=True))
    return features_BTE, torch.where(empty_1B1, start, last)


def spread_memories(core: nn.RNNBase) -> None:
    """Biases of the second gate (a GRU's z, an LSTM's f) that give the units memories of 1 to about 50 steps, so that
    none has to be learnt by backpropagation through time first.
    """
    for name, bias in core.named_parameters():
        if name.startswith("bias_hh"):
            bias[core.hidden_size : 2 * core.hidden_size] = torch.linspace(-1, 4, core.hidden_size)


def orthogonal_recurrence(core: nn.RNNBase, gain: float) -> None:
    """Each gate's recurrent matrix orthogonal times `gain`, for all directions (Saxe et al. 2014)."""
    for name, weight in core.named_parameters():
        if name.startswith("weight_hh"):
            for gate in weight.split(core.hidden_size):
                nn.init.orthogonal_(gate, gain)
