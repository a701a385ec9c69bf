"""Gated linear attention as com.microsoft::LinearAttention, whose heads are packed into the last dimension.

B batch, T time, H heads, G heads of keys and values, F features, K width of a value
"""

from __future__ import annotations

import torch

from thesean.deploy.lowering.in_torch import AtOnce
from thesean.deploy.lowering.lowered import Lowered
from thesean.deploy.lowering.value_blocks import linear_attention_node, linear_attention_operator
from thesean.targets.shared.core import Core


def linear_attention(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_attention_operator(query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, None, state_BGFK)


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, linear_attention)


def in_torch(core: Core, path: str) -> AtOnce:
    return AtOnce(core, "chunk")


def whole(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_attention_node(query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, None, state_BGFK)


def portable(core: Core, path: str, opset: int) -> Lowered:
    """The operator for now: `linear_products` writes products in its place, which need no widths of their own."""
    return Lowered(path, whole)
