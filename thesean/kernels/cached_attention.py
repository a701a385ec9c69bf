"""Softmax attention over the steps that are remembered and those that come.

B batch, T new steps, P steps that are remembered, S = P + T, H heads of queries, G heads of keys and values, K width of
queries and keys, C width of values
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import full_precision, widen


def cached_attention(
    query_BHTK: torch.Tensor,
    key_BGTK: torch.Tensor,
    value_BGTC: torch.Tensor,
    bias_B1TS: torch.Tensor,
    past_BGPK: torch.Tensor,
    past_BGPC: torch.Tensor,
    *sink_H: torch.Tensor,
    cap: float | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(q k' + bias) v over all S steps -> mixed_BHTC, and the keys and values that are remembered from here on.

    Each of the G heads of keys serves H / G heads of queries in a row. With a `cap` of c the scores are
    c tanh(q k' / c) (Gemma Team 2024, section 2); with a `window` of W the last W - 1 steps are remembered, else all:
    hiding what is older or later is the bias's affair. A `sink_H`, where one is given, takes its share of the weights
    as one more key of that score whose value is zero (OpenAI 2025, gpt-oss). T steps at once equal T single steps. Half
    precision is computed in float32.
    """
    key_BGSK, value_BGSC = torch.cat([past_BGPK, key_BGTK], 2), torch.cat([past_BGPC, value_BGTC], 2)
    batch, heads, time, width = query_BHTK.shape
    groups, length = key_BGSK.shape[1:3]
    with full_precision(query_BHTK.device):
        query, key, value, bias = widen(query_BHTK, key_BGSK, value_BGSC, bias_B1TS)
        # the queries of a group are rows of one product: its keys are read once
        scores = query.reshape(batch, groups, -1, width) @ key.mT
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores_BHTS = scores.reshape(batch, heads, time, length) + bias
        if sink_H:
            column_BHT1 = sink_H[0].to(scores.dtype).view(-1, 1, 1).expand(batch, -1, time, -1)
            scores_BHTS = torch.cat([scores_BHTS, column_BHT1], -1)
        weights_BHTS = torch.softmax(scores_BHTS, -1)[..., :length]
        mixed = weights_BHTS.reshape(batch, groups, -1, length) @ value
    mixed_BHTC = mixed.reshape(batch, heads, time, -1).to(value_BGTC.dtype)
    return mixed_BHTC, latest(key_BGSK, 2, window), latest(value_BGSC, 2, window)


def latest(x: torch.Tensor, dim: int, window: int | None) -> torch.Tensor:
    """What queries to come may still see: all, or the last `window` - 1 along `dim`."""
    if window is None:
        return x
    if torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export():
        # of a slice that may be all there is, torch.export's program takes the lengths alone that were traced
        step_S = torch.arange(x.shape[dim], device=x.device)
        return x.index_select(dim, step_S[step_S > x.shape[dim] - window])
    return torch.ops.aten.slice.Tensor(x, dim, -(window - 1) if window > 1 else x.shape[dim])
