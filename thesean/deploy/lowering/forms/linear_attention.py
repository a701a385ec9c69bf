"""Gated linear attention as com.microsoft::LinearAttention, whose heads are packed into the last dimension.

B batch, T time, H heads, G heads of keys and values, F features, K width of a value
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from thesean.deploy.lowering.in_torch import AtOnce
from thesean.deploy.lowering.lowered import Lowered
from thesean.deploy.lowering.value_blocks import linear_attention_node, linear_attention_operator
from thesean.targets.shared.core import Core

Write = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def linear_attention(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
    write: Write = linear_attention_operator,
) -> tuple[torch.Tensor, torch.Tensor]:
    return write(query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, None, state_BGFK)


def lower(core: Core, path: str, opset: int) -> Lowered:
    return Lowered(path, linear_attention)


def in_torch(core: Core, path: str) -> AtOnce:
    return AtOnce(core, "chunk")


def portable(core: Core, path: str, opset: int) -> Lowered:
    """The operator for now: `linear_products` writes products in its place, which need no widths of their own."""
    return Lowered(path, partial(linear_attention, write=linear_attention_node))
