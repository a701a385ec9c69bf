"""The gated delta rule as com.microsoft::LinearAttention with the update rule "gated_delta".

B batch, T time, H heads, F features of a key, K width of a value
"""

from __future__ import annotations

from typing import Any

import torch

from thesean.deploy.lowering.in_torch import AtOnce, Stepwise
from thesean.deploy.lowering.lowered import Lowered
from thesean.deploy.lowering.value_blocks import linear_attention_operator
from thesean.targets.shared.core import Core


def delta_rule(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    log_decay: torch.Tensor,
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_attention_operator(query_BTHF, key_BTHF, value_BTHK, log_decay, beta_BTH, state_BHFK)


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, delta_rule)


class _ByDecay(AtOnce):
    """At once where a head has one decay; of one a feature those between T steps would be T x T a key."""

    def forward(self, *tensors: torch.Tensor) -> Any:
        if tensors[-2].ndim == 4:
            return Stepwise(_step)(*tensors)
        return super().forward(*tensors)


def in_torch(core: Core, path: str) -> AtOnce:
    return _ByDecay(core, "chunk")


def _step(
    state: tuple[torch.Tensor, ...], at_t: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """u = b (v - a S k), S' = a S + k u."""
    query_BHF, key_BHF, value_BHK, beta_BH, decay = at_t
    kept_BHFK = (decay if decay.ndim == 3 else decay.unsqueeze(-1)).unsqueeze(-1) * state[0]
    missing_BHK = value_BHK - (key_BHF.unsqueeze(-2) @ kept_BHFK).squeeze(-2)
    update_BHK = beta_BH.unsqueeze(-1) * missing_BHK
    state_BHFK = kept_BHFK + key_BHF.unsqueeze(-1) * update_BHK.unsqueeze(-2)
    return (query_BHF.unsqueeze(-2) @ state_BHFK).squeeze(-2), (state_BHFK,)


def portable(core: Core, path: str, opset: int) -> Stepwise:
    """ONNX has no operator that solves a triangular system."""
    return Stepwise(_step)
