"""Linear attention with a decaying state: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t.

B batch, T time, C time within a chunk, H heads of queries, G heads of keys, values and states, R = H / G queries that
share one, F width of queries and keys, K width of values
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.blocks import blocks
from thesean.kernels.shared.decay import decay_between
from thesean.kernels.shared.precision import full_precision, widen


def linear_attention(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
    *,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention over a sequence, and the state after it (Yang et al. 2024, the chunked form).

    query_BTHF, key_BTGF, value_BTGK, log_decay_BTG <= 0 (None: nothing decays), state_BGFK -> out_BTHK, state_BGFK.
    Heads of queries hR..hR+R-1 read state h (Ainslie et al. 2023, grouped queries; G = H: one state each). Neither
    scaled nor normalised: for the normaliser, append a column of ones to the values and divide by the last column of
    the output. T steps at once equal T single steps. Quadratic in `chunk`, linear in T, in time and memory.
    Half-precision inputs are computed in float32, and the state stays so. Raises ValueError for shapes that do not fit.
    """
    _check(query_BTHF, key_BTGF, value_BTGK, log_decay_BTG, state_BGFK, chunk)
    dtype, groups = value_BTGK.dtype, key_BTGF.shape[2]
    query_BTHF, key_BTGF, value_BTGK, state_BGFK = widen(query_BTHF, key_BTGF, value_BTGK, state_BGFK)
    # not slices: the backward of a slice fills a tensor of the whole length, once per chunk
    queries = blocks(query_BTHF.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4), chunk, 3)
    keys, values = (blocks(x.transpose(1, 2), chunk, 2) for x in (key_BTGF, value_BTGK))
    decays: tuple[torch.Tensor | None, ...] = (None,) * len(queries)
    if log_decay_BTG is not None:
        decays = blocks(log_decay_BTG.to(state_BGFK.dtype).transpose(1, 2), chunk, 2)
    outs = []
    with full_precision(query_BTHF.device):
        for query_BGRCF, key_BGCF, value_BGCK, log_decay_BGC in zip(queries, keys, values, decays, strict=True):
            out_BGRCK, state_BGFK = _chunk(query_BGRCF, key_BGCF, value_BGCK, log_decay_BGC, state_BGFK)
            outs.append(out_BGRCK.permute(0, 3, 1, 2, 4).flatten(2, 3))
    return torch.cat(outs, dim=1).to(dtype), state_BGFK


def full_linear_attention(query_BTHF: torch.Tensor, key_BTGF: torch.Tensor, value_BTGK: torch.Tensor) -> torch.Tensor:
    """Bidirectional linear attention: every query reads S = sum over all t of k_t v_t^T.

    query_BTHF, key_BTGF, value_BTGK -> out_BTHK. Neither scaled nor normalised; to leave a token out, zero its key.
    """
    query, key, value = (x.transpose(1, 2) for x in widen(query_BTHF, key_BTGF, value_BTGK))
    with full_precision(query.device):
        state_BGFK = key.mT @ value
        out_BHTK = (query.unflatten(1, (key.shape[1], -1)) @ state_BGFK.unsqueeze(2)).flatten(1, 2)
    return out_BHTK.transpose(1, 2).to(value_BTGK.dtype)


def linear_attention_reference(
    query_BTHF: torch.Tensor,
    key_BTGF: torch.Tensor,
    value_BTGK: torch.Tensor,
    log_decay_BTG: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `linear_attention` must equal: the recurrence as it is written, one step at a time."""
    repeats = query_BTHF.shape[2] // key_BTGF.shape[2]
    if log_decay_BTG is None:
        log_decay_BTG = torch.zeros_like(key_BTGF[..., 0])
    outs = []
    steps = (x.unbind(1) for x in (query_BTHF, key_BTGF, value_BTGK, log_decay_BTG))
    for query_BHF, key_BGF, value_BGK, log_decay_BG in zip(*steps, strict=True):
        update_BGFK = key_BGF.unsqueeze(-1) * value_BGK.unsqueeze(-2)
        state_BGFK = log_decay_BG.exp()[..., None, None] * state_BGFK + update_BGFK
        outs.append((query_BHF.unsqueeze(-2) @ state_BGFK.repeat_interleave(repeats, 1)).squeeze(-2))
    return torch.stack(outs, dim=1), state_BGFK


def _chunk(
    query_BGRCF: torch.Tensor,
    key_BGCF: torch.Tensor,
    value_BGCK: torch.Tensor,
    log_decay_BGC: torch.Tensor | None,
    state_BGFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadratic inside the chunk; what came before it is in the state."""
    rows = query_BGRCF.shape[2:4]
    # the R queries of a state are rows of one product: nothing is repeated for them
    scores_BGRCC = (query_BGRCF.flatten(2, 3) @ key_BGCF.mT).unflatten(2, rows)
    if log_decay_BGC is None:
        mixed = scores_BGRCC.tril().flatten(2, 3) @ value_BGCK + query_BGRCF.flatten(2, 3) @ state_BGFK
        return mixed.unflatten(2, rows), state_BGFK + key_BGCF.mT @ value_BGCK
    decay_BGCC = decay_between(log_decay_BGC)
    from_start_BGC1 = log_decay_BGC.cumsum(-1).exp().unsqueeze(-1)
    inside = (scores_BGRCC * decay_BGCC.unsqueeze(2)).flatten(2, 3) @ value_BGCK
    before = (query_BGRCF * from_start_BGC1.unsqueeze(2)).flatten(2, 3) @ state_BGFK
    to_end_BGC1 = decay_BGCC[..., -1, :].unsqueeze(-1)
    state_BGFK = from_start_BGC1[..., -1:, :] * state_BGFK + (key_BGCF * to_end_BGC1).mT @ value_BGCK
    return (inside + before).unflatten(2, rows), state_BGFK


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    chunk: int,
) -> None:
    fits = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3]
    if fits:
        batch, time, groups, width = key.shape
        fits = query.shape[:2] == (batch, time) and query.shape[3] == width and query.shape[2] % groups == 0
        fits = fits and state.shape == (batch, groups, width, value.shape[3])
        fits = fits and (log_decay is None or log_decay.shape == key.shape[:3])
    if not fits or chunk < 1:
        raise ValueError(
            f"linear_attention: expected query (B, T, H, F), key (B, T, G, F) and value (B, T, G, K) with G a divisor "
            f"of H, log_decay (B, T, G), state (B, G, F, K) and chunk >= 1, found query {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}, log_decay "
            f"{None if log_decay is None else tuple(log_decay.shape)}, state {tuple(state.shape)}, chunk {chunk}."
        )
