"""The blocks of a guide, whatever their class calls what is in them, and a block with less in it.

B batch, T time, D width, E neurons or concatenated heads, O outputs, I inputs
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where a class of transformers has its blocks, and in a block what pruning and folding need."""

    blocks: Callable[[Any], nn.ModuleList]
    attention_output: Callable[[Any], Any]  # the linear map behind the heads
    mlp: Callable[[Any], tuple[Any, Any]]  # the linear maps before and behind the neurons
    residual: Callable[[Any], Any]  # the norm behind the MLP's sum, or the one before the MLP
    normed_after: bool  # a block ends in a norm
    fewer_heads: Callable[[Any, torch.Tensor], None]  # keeps these heads of a block
    silence: Callable[[Any], None]  # takes a block's attention away
    globs: tuple[str, str]  # of the attentions' and the MLPs' paths, as plans name them


def matrix_OI(linear: Any) -> torch.Tensor:
    """The weight, whichever way round it is held (GPT-2's Conv1D holds inputs first)."""
    return linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T


def put(linear: Any, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> None:
    """New weights, of other sizes perhaps."""
    held = weight_OI if isinstance(linear, nn.Linear) else weight_OI.T
    linear.weight, linear.bias = nn.Parameter(held.clone().contiguous()), nn.Parameter(bias_O.clone())
    if isinstance(linear, nn.Linear):
        linear.out_features, linear.in_features = weight_OI.shape
    else:
        linear.nf, linear.nx = weight_OI.shape


def keep_outputs(linear: Any, kept: torch.Tensor) -> None:
    put(linear, matrix_OI(linear)[kept], linear.bias.detach()[kept])


def keep_inputs(linear: Any, kept: torch.Tensor) -> None:
    put(linear, matrix_OI(linear)[:, kept], linear.bias.detach())


def features_of(heads_H: torch.Tensor, width: int) -> torch.Tensor:
    """The features of these heads among all heads' concatenated ones."""
    return (heads_H.unsqueeze(1) * width + torch.arange(width)).flatten()


def _bert_heads(block: Any, heads_H: torch.Tensor) -> None:
    attention = block.attention.self
    rows = features_of(heads_H, attention.attention_head_size)
    for linear in (attention.query, attention.key, attention.value):
        keep_outputs(linear, rows)
    keep_inputs(block.attention.output.dense, rows)
    attention.num_attention_heads, attention.all_head_size = len(heads_H), len(rows)


def _gpt2_heads(block: Any, heads_H: torch.Tensor) -> None:
    attention = block.attn
    rows, width = features_of(heads_H, attention.head_dim), attention.split_size
    keep_outputs(attention.c_attn, torch.cat([rows, rows + width, rows + 2 * width]))
    keep_inputs(attention.c_proj, rows)
    attention.num_heads, attention.split_size = len(heads_H), len(rows)


class _NormAlone(nn.Module):
    """What is left of a post-norm attention: its norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_BTD: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return self.norm(x_BTD), None


class _Nothing(nn.Module):
    """What is left of a branch beside a residual stream."""

    def forward(self, x_BTD: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(x_BTD), None


def _bert_silence(block: Any) -> None:
    block.attention = _NormAlone(block.attention.output.LayerNorm)


def _gpt2_silence(block: Any) -> None:
    block.attn = _Nothing()


BERT = Layout(
    blocks=lambda model: model.encoder.encoder.layer,
    attention_output=lambda block: block.attention.output.dense,
    mlp=lambda block: (block.intermediate.dense, block.output.dense),
    residual=lambda block: block.output.LayerNorm,
    normed_after=True,
    fewer_heads=_bert_heads,
    silence=_bert_silence,
    globs=("*attention", "*output.dense"),
)
GPT2 = Layout(
    blocks=lambda model: model.transformer.h,
    attention_output=lambda block: block.attn.c_proj,
    mlp=lambda block: (block.mlp.c_fc, block.mlp.c_proj),
    residual=lambda block: block.ln_2,
    normed_after=False,
    fewer_heads=_gpt2_heads,
    silence=_gpt2_silence,
    globs=("*attn", "*mlp"),
)


def with_blocks(model: Any, layout: Layout, blocks: Sequence[nn.Module]) -> Any:
    """`model` itself, with these blocks in place of its own."""
    held = layout.blocks(model)
    del held[:]
    held.extend(blocks)
    return model


def keep_blocks(guide: Any, layout: Layout, kept: Sequence[int]) -> Any:
    """A copy of the guide with these of its blocks."""
    model = copy.deepcopy(guide)
    return with_blocks(model, layout, [layout.blocks(model)[k] for k in kept])


@contextmanager
def seeing(modules: Sequence[nn.Module], inputs: bool = False) -> Iterator[dict[int, torch.Tensor]]:
    """Position -> what the module at it gave last, or read, of the calls inside."""
    seen: dict[int, torch.Tensor] = {}

    def watch(number: int) -> Any:
        def hook(_: nn.Module, given: Any, made: Any) -> None:
            value = given if inputs else made
            seen[number] = value[0] if isinstance(value, tuple) else value

        return hook

    handles = [module.register_forward_hook(watch(number)) for number, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
