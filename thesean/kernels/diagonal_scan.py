"""A diagonal state space with a decay per state: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t, g_t a vector.

B batch, T time, C time within a chunk, H heads, N states of a channel, P channels of a head
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.decay import decay_between
from thesean.kernels.shared.precision import full_precision, widen

# Steps that are taken at once. The decays between them are a (C, C, N) tensor a head; what that saves over keeping
# every state, (C, N, P) a head, ends where C reaches P.
_CHUNK = 16


def diagonal_scan(
    query_BTHN: torch.Tensor,
    key_BTHN: torch.Tensor,
    value_BTHP: torch.Tensor,
    log_decay_BTHN: torch.Tensor,
    state_BHNP: torch.Tensor,
    *,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selective scan of a diagonal state space (Gu and Dao 2023, eq. 2), its channels grouped in heads.

    query_BTHN (their C), key_BTHN (B), value_BTHP (dt x), log_decay_BTHN <= 0 (dt A), state_BHNP -> out_BTHP,
    state_BHNP. T steps at once equal T single steps. `chunk` steps at a time (None: as memory allows), linear in T.
    Half-precision inputs are computed in float32, and the state stays so. Raises ValueError for shapes that do not fit.
    """
    chunk = min(_CHUNK, max(1, value_BTHP.shape[-1])) if chunk is None else chunk
    _check(query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN, state_BHNP, chunk)
    dtype = value_BTHP.dtype
    *inputs, state_BHNP = widen(
        *(x.transpose(1, 2) for x in (query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN)), state_BHNP
    )
    if chunk == 1:
        query_BHTN, key_BHTN, value_BHTP, log_decay_BHTN = inputs
        out_BTHP, state_BHNP = _one_by_one(query_BHTN, key_BHTN, value_BHTP, log_decay_BHTN, state_BHNP)
        return out_BTHP.to(dtype), state_BHNP
    outs = []
    with full_precision(query_BTHN.device):
        for query_BHCN, key_BHCN, value_BHCP, log_decay_BHCN in zip(
            *(x.split(chunk, dim=2) for x in inputs), strict=True
        ):
            log_decay_BHNC = log_decay_BHCN.mT
            decay_BHNCC = decay_between(log_decay_BHNC)
            scores_BHCC = (query_BHCN.mT.unsqueeze(-1) * decay_BHNCC * key_BHCN.mT.unsqueeze(-2)).sum(2)
            from_start_BHCN = log_decay_BHCN.cumsum(-2).exp()
            out_BHCP = scores_BHCC @ value_BHCP + (query_BHCN * from_start_BHCN) @ state_BHNP
            to_end_BHNC = decay_BHNCC[..., -1, :]
            kept_BHNP = from_start_BHCN[..., -1, :].unsqueeze(-1) * state_BHNP
            state_BHNP = kept_BHNP + (key_BHCN.mT * to_end_BHNC) @ value_BHCP
            outs.append(out_BHCP.transpose(1, 2))
    return torch.cat(outs, dim=1).to(dtype), state_BHNP


def _one_by_one(
    query_BHTN: torch.Tensor,
    key_BHTN: torch.Tensor,
    value_BHTP: torch.Tensor,
    log_decay_BHTN: torch.Tensor,
    state_BHNP: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Between steps nothing but the state is computed; what goes into it and is read of it, for all steps at once. With
    768 heads of one channel and 16 states, 256 steps and back take 61 ms, and in chunks of one step 198.
    """
    decays = log_decay_BHTN.exp().unsqueeze(-1).unbind(2)
    updates = (key_BHTN.unsqueeze(-1) * value_BHTP.unsqueeze(-2)).unbind(2)
    states = []
    for decay_BHN1, update_BHNP in zip(decays, updates, strict=True):
        state_BHNP = torch.addcmul(update_BHNP, decay_BHN1, state_BHNP)
        states.append(state_BHNP)
    out_BHTP = (query_BHTN.unsqueeze(-1) * torch.stack(states, 2)).sum(-2)
    return out_BHTP.transpose(1, 2), state_BHNP


def diagonal_scan_reference(
    query_BTHN: torch.Tensor,
    key_BTHN: torch.Tensor,
    value_BTHP: torch.Tensor,
    log_decay_BTHN: torch.Tensor,
    state_BHNP: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `diagonal_scan` must equal: the recurrence as it is written, one step at a time."""
    outs = []
    steps = (x.unbind(1) for x in (query_BTHN, key_BTHN, value_BTHP, log_decay_BTHN))
    for query_BHN, key_BHN, value_BHP, log_decay_BHN in zip(*steps, strict=True):
        update_BHNP = key_BHN.unsqueeze(-1) * value_BHP.unsqueeze(-2)
        state_BHNP = log_decay_BHN.exp().unsqueeze(-1) * state_BHNP + update_BHNP
        outs.append((query_BHN.unsqueeze(-2) @ state_BHNP).squeeze(-2))
    return torch.stack(outs, dim=1), state_BHNP


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    chunk: int,
) -> None:
    fits = query.ndim == value.ndim == 4 and query.shape[:3] == value.shape[:3]
    if fits:
        batch, _, heads, states = query.shape
        fits = query.shape == key.shape == log_decay.shape and state.shape == (batch, heads, states, value.shape[3])
    if not fits or chunk < 1:
        raise ValueError(
            f"diagonal_scan: expected query, key and log_decay (B, T, H, N), value (B, T, H, P), state (B, H, N, P) "
            f"and chunk >= 1, found query {tuple(query.shape)}, key {tuple(key.shape)}, log_decay "
            f"{tuple(log_decay.shape)}, value {tuple(value.shape)}, state {tuple(state.shape)}, chunk {chunk}."
        )
