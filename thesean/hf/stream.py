"""A causal network that reads its tokens in chunks, with a state, each row as it would be alone.

B batch, T time, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.deploy.export_passes import remembering
from thesean.deploy.lowering.to_onnx import output_names
from thesean.errors import DataError, PassRefused
from thesean.hf.roles import Roles
from thesean.hf.states import CarriedStates, StateRows, Tensors
from thesean.passes.base import run_passes
from thesean.passes.cast_floats import CastFloats, cast_signature, dtypes_for
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.signature import Signature
from thesean.passes.graph.surgery import clone
from thesean.passes.slices_of_joins import SlicesOfJoins
from thesean.passes.thread_state import ThreadState, zero_states
from thesean.targets.shared.steps import Steps


@dataclass(frozen=True)
class Stream:
    """`threaded` shares its parameters with the network that it was made of."""

    threaded: fx.GraphModule
    signature: Signature
    roles: Roles
    index: int  # of the logits among its outputs
    count: int  # of its outputs that are no states
    rows: StateRows

    @property
    def packs(self) -> bool:
        """Whether rows of a batch may be of unequal length."""
        return bool(self.threaded.meta["rows_are_alone"]) and self.rows.joins

    def read(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, past: CarriedStates) -> torch.Tensor:
        """logits_BTV of what comes next, zeros where nothing is seen; `past` goes on. Raises DataError."""
        states = past.states if past.states is not None else zero_states(self.threaded, len(ids_BT))
        if past.tokens_B is None:
            past.tokens_B = torch.zeros(len(ids_BT), dtype=torch.int64, device=ids_BT.device)
        if len(past.tokens_B) != len(ids_BT):
            raise DataError(f"past_key_values is of {len(past.tokens_B)} rows, input_ids of {len(ids_BT)}.")
        if mask_BT is None or bool(mask_BT.all()):
            logits_BTV, states = self._chunk(ids_BT, states, past.tokens_B)
            past.tokens_B = past.tokens_B + ids_BT.shape[1]
        elif self.packs:
            logits_BTV, states = self._unequal(ids_BT, mask_BT.to(torch.bool), states, past.tokens_B)
            past.tokens_B = past.tokens_B + mask_BT.to(torch.bool).sum(1)
        else:
            raise DataError(
                "prompts of unequal length: this network counts the steps of all rows together. Give prompts of one "
                "length, or one at a time, or use_cache=False."
            )
        past.states, past.steps = states, past.steps + ids_BT.shape[1]
        return logits_BTV

    def _chunk(self, ids_BT: torch.Tensor, states: Tensors, before_B: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Tokens alone, `before_B` of each row were read before."""
        given = {self.roles.tokens: ids_BT}
        for spec in self.signature.inputs:
            if spec.name == self.roles.positions:
                steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
                given[spec.name] = (before_B.unsqueeze(1) + steps_T).to(spec.dtype)
            elif spec.name == self.roles.mask:
                given[spec.name] = torch.ones(ids_BT.shape, dtype=spec.dtype, device=ids_BT.device)
        found: Any = self.threaded(**given, **states)
        return found[self.index], dict(zip(self.rows.specs, found[self.count :], strict=True))

    def _unequal(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, states: Tensors, before_B: torch.Tensor
    ) -> tuple[torch.Tensor, Tensors]:
        """All rows as far as the shortest goes, then the others without it: no padding is ever read."""
        steps = Steps(mask_BT)
        front_BT = steps.to_front(ids_BT)
        order = steps.count_B.argsort(stable=True)
        counts = steps.count_B[order].tolist()
        states, done, begun = self.rows.take(states, order), 0, 0
        ended: list[Tensors] = []
        logits_BTV: torch.Tensor | None = None
        for count in sorted(set(counts)):
            rows = order[begun:]
            if count > done:
                chunk, states = self._chunk(front_BT[rows, done:count], states, before_B[rows] + done)
                if logits_BTV is None:
                    logits_BTV = chunk.new_zeros((*ids_BT.shape, chunk.shape[-1]))
                logits_BTV[rows, done:count] = chunk
            ending = counts.count(count)
            numbers = torch.arange(len(rows), device=order.device)
            ended.append(self.rows.take(states, numbers[:ending]))
            states, done, begun = self.rows.take(states, numbers[ending:]), count, begun + ending
        if logits_BTV is None:
            raise DataError("attention_mask hides every token.")
        return steps.back(logits_BTV), self.rows.take(self.rows.join(ended), order.argsort())


def stream_of(network: fx.GraphModule, signature: Signature, roles: Roles) -> Stream | str:
    """Why not, where chunks with a state aren't the whole. What is in half precision is tried in float32."""
    with evaluating(network):
        try:
            proven = None
            if dtypes := dtypes_for(network, signature, None):
                exact, _ = run_passes(clone(network).eval().requires_grad_(False), CastFloats(dtypes))
                proven = _threaded(exact, cast_signature(signature, dtypes))
                del exact
            threaded = _threaded(network, signature, proven)
        except PassRefused as refusal:
            return str(refusal)
    names = output_names(network)
    return Stream(threaded, signature, roles, names.index(roles.logits), len(names), StateRows(threaded.meta["states"]))


def _threaded(network: fx.GraphModule, signature: Signature, proven: fx.GraphModule | None = None) -> fx.GraphModule:
    return run_passes(network, SlicesOfJoins(), *remembering(signature), ThreadState(signature, proven))[0]
