"""The gated delta rule: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, y_t = q_t S_t, with a_t = exp(g_t).

B batch, T time, C time within a chunk, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.blocks import blocks
from thesean.kernels.shared.decay import decay_between
from thesean.kernels.shared.precision import full_precision, widen


def delta_rule(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    log_decay_BTH: torch.Tensor,
    state_BHFK: torch.Tensor,
    *,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A memory that corrects what it holds at a key instead of adding to it (Yang, Kautz and Hatamizadeh 2024, eq. 10).

    query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH <= 0, state_BHFK -> out_BTHK, state_BHFK. Stable for keys
    with b |k|^2 <= 2; neither scales nor normalises. T steps at once equal T single steps. Quadratic in `chunk`, linear
    in T. Half-precision inputs are computed in float32, and the state stays so. Raises ValueError for shapes that do
    not fit.

    Chunked as in their section 3.3, exactly: with u_t = b_t (v_t - a_t S_{t-1}^T k_t) the state is a sum of k_t u_t^T,
    and all u of a chunk solve one unit lower triangular system.
    """
    _check(query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH, state_BHFK, chunk)
    dtype = value_BTHK.dtype
    # heads before time, and every input as a matrix: beta and decay become columns
    *inputs, state_BHFK = widen(
        *(x.transpose(1, 2) for x in (query_BTHF, key_BTHF, value_BTHK)),
        *(x.transpose(1, 2).unsqueeze(-1) for x in (beta_BTH, log_decay_BTH)),
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
    log_decay_BTH: torch.Tensor,
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `delta_rule` must equal: the recurrence as it is written, one step at a time."""
    eye_FF = torch.eye(key_BTHF.shape[-1], dtype=key_BTHF.dtype, device=key_BTHF.device)
    outs = []
    steps = (x.unbind(1) for x in (query_BTHF, key_BTHF, value_BTHK, beta_BTH, log_decay_BTH))
    for query_BHF, key_BHF, value_BHK, beta_BH, log_decay_BH in zip(*steps, strict=True):
        beta_BH11, decay_BH11 = beta_BH[..., None, None], log_decay_BH.exp()[..., None, None]
        erase_BHFF = eye_FF - beta_BH11 * key_BHF.unsqueeze(-1) * key_BHF.unsqueeze(-2)
        write_BHFK = beta_BH11 * key_BHF.unsqueeze(-1) * value_BHK.unsqueeze(-2)
        state_BHFK = decay_BH11 * (erase_BHFF @ state_BHFK) + write_BHFK
        outs.append((query_BHF.unsqueeze(-2) @ state_BHFK).squeeze(-2))
    return torch.stack(outs, dim=1), state_BHFK


def _chunk(
    query_BHCF: torch.Tensor,
    key_BHCF: torch.Tensor,
    value_BHCK: torch.Tensor,
    beta_BHC1: torch.Tensor,
    log_decay_BHC1: torch.Tensor,
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    log_decay_BHC = log_decay_BHC1.squeeze(-1)
    decay_BHCC = decay_between(log_decay_BHC)
    from_start_BHC1 = log_decay_BHC.cumsum(-1).exp().unsqueeze(-1)
    # (I + L) U = b (V - decayed K S): what the keys of this chunk read of each other is strictly lower triangular, and
    # forward substitution is the recurrence itself, so no digits are lost
    lower_BHCC = (beta_BHC1 * (key_BHCF @ key_BHCF.mT) * decay_BHCC).tril(-1)
    wanted_BHCK = beta_BHC1 * (value_BHCK - (from_start_BHC1 * key_BHCF) @ state_BHFK)
    update_BHCK = torch.linalg.solve_triangular(lower_BHCC, wanted_BHCK, upper=False, unitriangular=True)
    out_BHCK = (query_BHCF @ key_BHCF.mT * decay_BHCC) @ update_BHCK + (from_start_BHC1 * query_BHCF) @ state_BHFK
    to_end_BHC1 = decay_BHCC[..., -1, :].unsqueeze(-1)
    return out_BHCK, from_start_BHC1[..., -1:, :] * state_BHFK + (to_end_BHC1 * key_BHCF).mT @ update_BHCK


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
        fits = fits and beta.shape == log_decay.shape == query.shape[:3]
    if not fits or chunk < 1:
        raise ValueError(
            f"delta_rule: expected query and key (B, T, H, F), value (B, T, H, K), beta and log_decay (B, T, H), state "
            f"(B, H, F, K) and chunk >= 1, found query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, beta {tuple(beta.shape)}, log_decay {tuple(log_decay.shape)}, state "
            f"{tuple(state.shape)}, chunk {chunk}."
        )
