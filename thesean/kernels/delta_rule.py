"""The gated delta rule: S_t = (I - b_t k_t k_t^T) a_t S_{t-1} + b_t k_t v_t^T, y_t = q_t S_t, with a_t = exp(g_t), one
number a head, or diagonal: one for each feature of its keys.

B batch, T time, C time within a chunk, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.blocks import blocks
from thesean.kernels.shared.decay import decay_between
from thesean.kernels.shared.precision import full_precision, widen

# Steps that are taken at once, by how many decays a head has. Of one a feature those between steps are a (C, C, F)
# tensor a head, as in diagonal_scan.
_CHUNK, _CHUNK_OF_FEATURES = 64, 16


def delta_rule(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    log_decay: torch.Tensor,
    state_BHFK: torch.Tensor,
    *,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A memory that corrects what it holds at a key instead of adding to it (Yang, Kautz and Hatamizadeh 2024, eq. 10;
    with a decay for each feature Kimi Team 2025, eq. 1).

    query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay <= 0 of (B, T, H) or (B, T, H, F), state_BHFK -> out_BTHK,
    state_BHFK. Stable for keys with b |k|^2 <= 2; neither scales nor normalises. T steps at once equal T single steps.
    `chunk` steps at a time (None: as memory allows), linear in T. Half-precision inputs are computed in float32, and
    the state stays so. Raises ValueError for shapes that do not fit.

    Chunked as in section 3.3 of the first, exactly: with u_t = b_t (v_t - (a_t S_{t-1})^T k_t) the state is a sum of
    k_t u_t^T, and all u of a chunk solve one unit lower triangular system.
    """
    if chunk is None:
        chunk = _CHUNK if log_decay.ndim == 3 else _CHUNK_OF_FEATURES
    _check(query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay, state_BHFK, chunk)
    dtype = value_BTHK.dtype
    # heads before time, and every input as a matrix: beta and decay become columns
    *inputs, state_BHFK = widen(
        *(x.transpose(1, 2) for x in (query_BTHF, key_BTHF, value_BTHK)),
        *((x.unsqueeze(-1) if x.ndim == 3 else x).transpose(1, 2) for x in (beta_BTH, log_decay)),
        state_BHFK,
    )
    outs = []
    with full_precision(query_BTHF.device):
        # not slices: the backward of a slice fills a tensor of the whole length, once per chunk
        for query, key, value, beta, log_decay in zip(*(blocks(x, chunk, 2) for x in inputs), strict=True):
            out_BHCK, state_BHFK = _chunk(query, key, value, beta, log_decay, state_BHFK)
            outs.append(out_BHCK.transpose(1, 2))
    return torch.cat(outs, dim=1).to(dtype), state_BHFK


def delta_rule_reference(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    log_decay: torch.Tensor,
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `delta_rule` must equal: the recurrence as it is written, one step at a time."""
    eye_FF = torch.eye(key_BTHF.shape[-1], dtype=key_BTHF.dtype, device=key_BTHF.device)
    outs = []
    log_decay_BTHF = log_decay.unsqueeze(-1).expand_as(key_BTHF) if log_decay.ndim == 3 else log_decay
    steps = (x.unbind(1) for x in (query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTHF))
    for query_BHF, key_BHF, value_BHK, beta_BH, log_decay_BHF in zip(*steps, strict=True):
        beta_BH11, decay_BHF1 = beta_BH[..., None, None], log_decay_BHF.exp().unsqueeze(-1)
        erase_BHFF = eye_FF - beta_BH11 * key_BHF.unsqueeze(-1) * key_BHF.unsqueeze(-2)
        write_BHFK = beta_BH11 * key_BHF.unsqueeze(-1) * value_BHK.unsqueeze(-2)
        state_BHFK = erase_BHFF @ (decay_BHF1 * state_BHFK) + write_BHFK
        outs.append((query_BHF.unsqueeze(-2) @ state_BHFK).squeeze(-2))
    return torch.stack(outs, dim=1), state_BHFK


def _chunk(
    query_BHCF: torch.Tensor,
    key_BHCF: torch.Tensor,
    value_BHCK: torch.Tensor,
    beta_BHC1: torch.Tensor,
    log_decay: torch.Tensor,  # (B, H, C, 1) or (B, H, C, F)
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    from_start = log_decay.cumsum(-2).exp()
    if log_decay.shape[-1] == 1:
        decay_BHCC = decay_between(log_decay.squeeze(-1))
        of_keys_BHCC, of_queries_BHCC = ((x @ key_BHCF.mT) * decay_BHCC for x in (key_BHCF, query_BHCF))
        to_end = decay_BHCC[..., -1, :].unsqueeze(-1)
    else:
        decay_BHFCC = decay_between(log_decay.mT)
        read_BHFCC = decay_BHFCC * key_BHCF.mT.unsqueeze(-2)
        of_keys_BHCC, of_queries_BHCC = ((x.mT.unsqueeze(-1) * read_BHFCC).sum(2) for x in (key_BHCF, query_BHCF))
        to_end = decay_BHFCC[..., -1, :].mT
    # (I + L) U = b (V - decayed K S): what the keys of this chunk read of each other is strictly lower triangular, and
    # forward substitution is the recurrence itself, so no digits are lost
    lower_BHCC = (beta_BHC1 * of_keys_BHCC).tril(-1)
    wanted_BHCK = beta_BHC1 * (value_BHCK - (from_start * key_BHCF) @ state_BHFK)
    update_BHCK = torch.linalg.solve_triangular(lower_BHCC, wanted_BHCK, upper=False, unitriangular=True)
    out_BHCK = of_queries_BHCC @ update_BHCK + (from_start * query_BHCF) @ state_BHFK
    kept_BHFK = from_start[..., -1, :].unsqueeze(-1) * state_BHFK
    return out_BHCK, kept_BHFK + (to_end * key_BHCF).mT @ update_BHCK


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    chunk: int,
) -> None:
    fits = query.ndim == value.ndim == 4 and query.shape == key.shape and query.shape[:3] == value.shape[:3]
    if fits:
        batch, _, heads, width = query.shape
        fits = state.shape == (batch, heads, width, value.shape[3])
        fits = fits and beta.shape == query.shape[:3] and log_decay.shape in (query.shape[:3], query.shape)
    if not fits or chunk < 1:
        raise ValueError(
            f"delta_rule: expected query and key (B, T, H, F), value (B, T, H, K), beta (B, T, H), log_decay (B, T, H) "
            f"or (B, T, H, F), state (B, H, F, K) and chunk >= 1, found query {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}, beta {tuple(beta.shape)}, log_decay "
            f"{tuple(log_decay.shape)}, state {tuple(state.shape)}, chunk {chunk}."
        )
