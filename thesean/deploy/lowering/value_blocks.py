"""com.microsoft::LinearAttention in the widths that onnxruntime is fast at.

Version 1.32 has a fast CPU path for values of width 32 and 64 and features in multiples of 16; elsewhere it is up to
50 times slower (4 heads, F = 64, T = 512, one thread: 0.35 ms at K = 32, 20 ms at K = 33). The columns of the values do
not see each other, so they are cut into blocks of those widths, the last one padded with zeros.

B batch, T time, H heads, G heads of keys and values, F features, K width of a value
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear_attention_operator(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One com.microsoft::LinearAttention for each block of the values. The decay is one a head (B, T, G), one a feature
    (B, T, G, F), or none; with a decay and `beta_BTG` the delta rule updates the state, whose columns do not see each
    other either.
    """
    features = query_BTHF.shape[-1]
    missing = -features % 16
    if missing:
        query_BTHF, key_BTGF = F.pad(query_BTHF, (0, missing)), F.pad(key_BTGF, (0, missing))
        if log_decay is not None and log_decay.ndim == 4:
            log_decay = F.pad(log_decay, (0, missing))
    outs, states, start = [], [], 0
    for width, padded in value_blocks(value_BTGK.shape[-1]):
        block = slice(start, start + width)
        value, state = value_BTGK[..., block], state_BGFK[..., block]
        if missing or padded > width:
            value, state = F.pad(value, (0, padded - width)), F.pad(state, (0, padded - width, 0, missing))
        out, state = linear_attention_node(query_BTHF, key_BTGF, value, log_decay, beta_BTG, state)
        outs.append(out[..., :width])
        states.append(state[:, :, :features, :width])
        start += width
    return (outs[0], states[0]) if len(outs) == 1 else (torch.cat(outs, -1), torch.cat(states, -1))


def value_blocks(width: int) -> list[tuple[int, int]]:
    """(columns, padded columns) that cover `width`: 64 at a time, then 32 or 64; a single last one as it is."""
    blocks = [(64, 64)] * (width // 64)
    rest = width % 64
    if rest > 32 and rest - 32 == 1:
        return [*blocks, (32, 32), (1, 1)]
    if rest:
        blocks.append((rest, 1 if rest == 1 else 32 if rest <= 32 else 64))
    return blocks


def linear_attention_node(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay: torch.Tensor | None,
    beta_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator itself, whatever the widths."""
    B, T, H, features = query_BTHF.shape
    G, K = value_BTGK.shape[2:]
    inputs = [query_BTHF.flatten(2), key_BTGF.flatten(2), value_BTGK.flatten(2), state_BGFK]
    inputs += [gate.flatten(2) for gate in (log_decay, beta_BTG) if gate is not None]
    rule = "linear" if log_decay is None else "gated" if beta_BTG is None else "gated_delta"
    out, state_BGFK = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        inputs,
        {
            "q_num_heads": H,
            "kv_num_heads": G,
            "scale": 1.0,  # 0 would mean 1 / sqrt(F)
            "update_rule": rule,
        },
        dtypes=[query_BTHF.dtype] * 2,
        shapes=[[B, T, H * K], [B, G, features, K]],
        version=1,
    )
    return out.unflatten(-1, (H, K)), state_BGFK
