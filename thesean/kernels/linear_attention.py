"""Linear attention with a decaying state: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t.

B batch, T time, C time within a chunk, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

import torch

from thesean.kernels.dispatch import Backend, choose, load
from thesean.kernels.precision import full_precision, widen


def linear_attention(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    log_decay_BTH: torch.Tensor | None,
    state_BHFK: torch.Tensor,
    *,
    chunk: int = 64,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention over a sequence, and the state after it (Yang et al. 2024, the chunked form).

    query_BTHF, key_BTHF, value_BTHK, log_decay_BTH <= 0 (None: nothing decays), state_BHFK -> out_BTHK, state_BHFK.
    Neither scaled nor normalised: for the normaliser, append a column of ones to the values and divide by the last
    column of the output. T steps at once equal T single steps. Quadratic in `chunk`, linear in T, in time and memory.
    Half-precision inputs are computed in float32, and the state stays so. Raises ValueError for shapes that do not fit.
    """
    _check(query_BTHF, key_BTHF, value_BTHK, log_decay_BTH, state_BHFK, chunk)
    dtype = value_BTHK.dtype
    if choose(backend, "linear_attention", query_BTHF.device) == "triton":
        out_BTHK, state_BHFK = load("linear_attention")(
            query_BTHF, key_BTHF, value_BTHK, log_decay_BTH, state_BHFK, chunk=chunk
        )
        return out_BTHK.to(dtype), state_BHFK

    query_BTHF, key_BTHF, value_BTHK, state_BHFK = widen(query_BTHF, key_BTHF, value_BTHK, state_BHFK)
    # split, not slices: the backward of a slice fills a tensor of the whole length, once per chunk
    queries, keys, values = (x.transpose(1, 2).split(chunk, dim=2) for x in (query_BTHF, key_BTHF, value_BTHK))
    decays: tuple[torch.Tensor | None, ...] = (None,) * len(queries)
    if log_decay_BTH is not None:
        decays = log_decay_BTH.to(state_BHFK.dtype).transpose(1, 2).split(chunk, dim=2)
    outs = []
    with full_precision(query_BTHF.device):
        for query_BHCF, key_BHCF, value_BHCK, log_decay_BHC in zip(queries, keys, values, decays, strict=True):
            out_BHCK, state_BHFK = _chunk(query_BHCF, key_BHCF, value_BHCK, log_decay_BHC, state_BHFK)
            outs.append(out_BHCK.transpose(1, 2))
    return torch.cat(outs, dim=1).to(dtype), state_BHFK


def full_linear_attention(query_BTHF: torch.Tensor, key_BTHF: torch.Tensor, value_BTHK: torch.Tensor) -> torch.Tensor:
    """Bidirectional linear attention: every query reads S = sum over all t of k_t v_t^T.

    query_BTHF, key_BTHF, value_BTHK -> out_BTHK. Neither scaled nor normalised; to leave a token out, zero its key.
    """
    query, key, value = (x.transpose(1, 2) for x in widen(query_BTHF, key_BTHF, value_BTHK))
    with full_precision(query.device):
        out_BHTK = query @ (key.mT @ value)
    return out_BHTK.transpose(1, 2).to(value_BTHK.dtype)


def linear_attention_reference(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    log_decay_BTH: torch.Tensor | None,
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `linear_attention` must equal: the recurrence as it is written, one step at a time."""
    if log_decay_BTH is None:
        log_decay_BTH = torch.zeros_like(query_BTHF[..., 0])
    outs = []
    steps = (x.unbind(1) for x in (query_BTHF, key_BTHF, value_BTHK, log_decay_BTH))
    for query_BHF, key_BHF, value_BHK, log_decay_BH in zip(*steps, strict=True):
        update_BHFK = key_BHF.unsqueeze(-1) * value_BHK.unsqueeze(-2)
        state_BHFK = log_decay_BH.exp()[..., None, None] * state_BHFK + update_BHFK
        outs.append((query_BHF.unsqueeze(-2) @ state_BHFK).squeeze(-2))
    return torch.stack(outs, dim=1), state_BHFK


def _chunk(
    query_BHCF: torch.Tensor,
    key_BHCF: torch.Tensor,
    value_BHCK: torch.Tensor,
    log_decay_BHC: torch.Tensor | None,
    state_BHFK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quadratic inside the chunk; what came before it is in the state."""
    scores_BHCC = query_BHCF @ key_BHCF.mT
    if log_decay_BHC is None:
        out_BHCK = scores_BHCC.tril() @ value_BHCK + query_BHCF @ state_BHFK
        return out_BHCK, state_BHFK + key_BHCF.mT @ value_BHCK
    decay_BHCC = _decay_between(log_decay_BHC)
    from_start_BHC1 = log_decay_BHC.cumsum(-1).exp().unsqueeze(-1)
    out_BHCK = (scores_BHCC * decay_BHCC) @ value_BHCK + (query_BHCF * from_start_BHC1) @ state_BHFK
    to_end_BHC1 = decay_BHCC[..., -1, :].unsqueeze(-1)
    state_BHFK = from_start_BHC1[..., -1:, :] * state_BHFK + (key_BHCF * to_end_BHC1).mT @ value_BHCK
    return out_BHCK, state_BHFK


def _decay_between(log_decay_BHC: torch.Tensor) -> torch.Tensor:
    """decay_BHCC[t, s] = exp(g_{s+1} + ... + g_t) for s <= t, zero above the diagonal."""
    size = log_decay_BHC.shape[-1]
    keep_CC = torch.ones(size, size, dtype=torch.bool, device=log_decay_BHC.device).tril()
    # Each column sums its own steps. The difference of two cumulative sums would lose the digits of what follows a
    # strong decay, and make nan of a reset (g = -inf).
    steps_BHCC = log_decay_BHC.unsqueeze(-1).expand(*log_decay_BHC.shape, size).masked_fill(~keep_CC.tril(-1), 0.0)
    # masked before exp: above the diagonal 0 * inf would be nan, in the gradient even under a later mask
    return steps_BHCC.cumsum(-2).masked_fill(~keep_CC, -torch.inf).exp()


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor | None,
    state: torch.Tensor,
    chunk: int,
) -> None:
    fits = query.ndim == value.ndim == 4 and query.shape == key.shape and query.shape[:3] == value.shape[:3]
    if fits:
        batch, _, heads, width = query.shape
        fits = state.shape == (batch, heads, width, value.shape[3])
        fits = fits and (log_decay is None or log_decay.shape == query.shape[:3])
    if not fits or chunk < 1:
        raise ValueError(
            f"linear_attention: expected query and key (B, T, H, F), value (B, T, H, K), log_decay (B, T, H), state "
            f"(B, H, F, K) and chunk >= 1, found query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, log_decay {None if log_decay is None else tuple(log_decay.shape)}, state "
            f"{tuple(state.shape)}, chunk {chunk}."
        )
