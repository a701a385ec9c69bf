"""Softmax attention over the last W tokens, in one mean with what older tokens add up to.

B batch, T time, W tokens in the window, S = W + T, H heads, G heads of keys and values, C width of queries and keys,
k = K + 1 columns of the values, N blocks of L queries, J = L + W keys that a block sees
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.precision import full_precision, widen

# Fewer queries a block than this cost more in calls than they save in masked scores.
LEAST_BLOCK = 32

# Where the older tokens' weights are below exp(-80) they count for nothing, and exp(80) is still a float32.
LARGEST_EXPONENT = 80.0


def window_attention(
    query_BTHC: torch.Tensor,
    key_BSGC: torch.Tensor,
    value_BSGk: torch.Tensor,
    older_BTHk: torch.Tensor,
    gate: torch.Tensor,
    bias_HW: torch.Tensor | None = None,
    *,
    block: int | None = None,
) -> torch.Tensor:
    """y_t = (sum_s exp(q_t.k_s + bias) v_s + exp(gate) o_t) / the same of the weights, s over t-W+1..t -> mean_BTHK.

    The keys and values of the W tokens before the first query come in front: query t's own are in row W + t, and the
    window is W = S - T. The values' last column is 1 for a token and 0 in a row that holds none; that of `older_BTHk`
    is the sum of the older tokens' weights, its other columns the sum of their weighted values. `gate` is a head's (H),
    or a query's in a head (B, T, H); the bias is column t - s of `bias_HW`. Each of the G heads of keys serves H / G
    heads of queries in a row. exp() is taken below the largest exponent, of window and older tokens alike, so that no
    score overflows or vanishes (the sum of Zhang et al. 2024, LoLCATs, eq. 6, with all of it below one maximum). Linear
    in T, in time and memory, `block` queries at a time (None: W, where that is enough); half precision is computed in
    float32. Raises ValueError for shapes that do not fit.
    """
    _check(query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate, bias_HW)
    dtype = value_BSGk.dtype
    query, key, value, older, gate = widen(query_BTHC, key_BSGC, value_BSGk, older_BTHk, gate)
    with full_precision(query.device):
        sums_BTHk, peak_BTH = _banded(query, key, value, None if bias_HW is None else bias_HW.to(query.dtype), block)
        # -inf where there is nothing older. Constants in the backward: they cancel in the quotient.
        top_BTH = torch.maximum(peak_BTH, gate.detach() + older[..., -1].detach().log())
        sums_BTHk = sums_BTHk * (peak_BTH - top_BTH).exp().unsqueeze(-1)
        sums_BTHk = sums_BTHk + older * (gate - top_BTH).clamp(max=LARGEST_EXPONENT).exp().unsqueeze(-1)
        return (sums_BTHk[..., :-1] / sums_BTHk[..., -1:]).to(dtype)


def window_attention_reference(
    query_BTHC: torch.Tensor,
    key_BSGC: torch.Tensor,
    value_BSGk: torch.Tensor,
    older_BTHk: torch.Tensor,
    gate: torch.Tensor,
    bias_HW: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `window_attention` must equal: the formula as it is written, one token at a time; it may overflow."""
    window = key_BSGC.shape[1] - query_BTHC.shape[1]
    repeats = query_BTHC.shape[2] // key_BSGC.shape[2]
    key_BSHC, value_BSHk = (x.repeat_interleave(repeats, 2) for x in (key_BSGC, value_BSGk))
    means = []
    gate_BTH = gate.expand(older_BTHk.shape[:3])
    for t, query_BHC in enumerate(query_BTHC.unbind(1)):
        rows = slice(t + 1, t + 1 + window)
        scores_BHW = torch.einsum("bhc,bwhc->bhw", query_BHC, key_BSHC[:, rows])
        weights_BHW = (scores_BHW if bias_HW is None else scores_BHW + bias_HW.flip(1)).exp()
        sums_BHk = torch.einsum("bhw,bwhk->bhk", weights_BHW * (value_BSHk[:, rows, :, -1] > 0).mT, value_BSHk[:, rows])
        sums_BHk = sums_BHk + gate_BTH[:, t].exp().unsqueeze(-1) * older_BTHk[:, t]
        means.append(sums_BHk[..., :-1] / sums_BHk[..., -1:])
    return torch.stack(means, 1)


def _banded(
    query_BTHC: torch.Tensor,
    key_BSGC: torch.Tensor,
    value_BSGk: torch.Tensor,
    bias_HW: torch.Tensor | None,
    block: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum over the window of exp(score - peak) v and of exp(score - peak), and the peak: a token's largest score.

    Queries come in blocks of L, each with the L + W keys that any of them sees: nothing has T x T elements.
    """
    T, heads, groups = query_BTHC.shape[1], query_BTHC.shape[2], key_BSGC.shape[2]
    window = key_BSGC.shape[1] - T
    # one step must not pay for a whole block
    size = min(T, max(window, LEAST_BLOCK)) if block is None else block
    start_N1 = torch.arange(0, T, size, device=query_BTHC.device).unsqueeze(1)
    row_L, row_J = (torch.arange(n, device=query_BTHC.device) for n in (size, size + window))
    # the last block may reach past the end: its last rows are repeated, and left out below
    at_NL, at_NJ = (start_N1 + row_L).clamp(max=T - 1), (start_N1 + row_J).clamp(max=T + window - 1)
    query_BNLHC, key_BNJGC, value_BNJGk = query_BTHC[:, at_NL], key_BSGC[:, at_NJ], value_BSGk[:, at_NJ]
    query_BNGRLC = query_BNLHC.unflatten(3, (groups, heads // groups)).permute(0, 1, 3, 4, 2, 5)
    scores_BNGRJ = query_BNGRLC.flatten(3, 4) @ key_BNJGC.permute(0, 1, 3, 4, 2)
    ahead_LJ = row_J - row_L.unsqueeze(1)
    seen_LJ = (ahead_LJ > 0) & (ahead_LJ <= window)
    seen_BN1LJ = seen_LJ & (value_BNJGk[:, :, :, :1, -1] > 0).permute(0, 1, 3, 2).unsqueeze(-2)
    scores_BNGRLJ = scores_BNGRJ.unflatten(3, (heads // groups, size))
    if bias_HW is not None:
        bias_HLJ = bias_HW[:, (window - ahead_LJ).clamp(0, window - 1)]
        scores_BNGRLJ = scores_BNGRLJ + bias_HLJ.unflatten(0, (groups, heads // groups))
    scores_BNGRLJ = scores_BNGRLJ.masked_fill(~seen_BN1LJ.unsqueeze(3), -torch.inf)
    peak_BNGRL = scores_BNGRLJ.detach().amax(-1)
    weights_BNGRJ = (scores_BNGRLJ - peak_BNGRL.unsqueeze(-1)).exp().flatten(3, 4)
    sums_BNGRk = weights_BNGRJ @ value_BNJGk.transpose(2, 3)
    sums_BNLHk = sums_BNGRk.unflatten(3, (heads // groups, size)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
    peak_BNLH = peak_BNGRL.permute(0, 1, 4, 2, 3).flatten(3, 4)
    return sums_BNLHk.flatten(1, 2)[:, :T], peak_BNLH.flatten(1, 2)[:, :T]


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    older: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    fits = query.ndim == key.ndim == value.ndim == older.ndim == 4 and key.shape[:3] == value.shape[:3]
    if fits:
        fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and query.shape[2] % key.shape[2] == 0
        fits = fits and key.shape[1] > query.shape[1]
        # not as tuples: where sizes are symbols, (H,) == (B, T, H) would ask whether H is B
        fits = fits and gate.shape == query.shape[(2 if gate.ndim == 1 else 0) : 3]
        fits = fits and older.shape == (*query.shape[:3], value.shape[3])
        fits = fits and (bias is None or bias.shape == (query.shape[2], key.shape[1] - query.shape[1]))
    if not fits:
        raise ValueError(
            "window_attention: expected query (B, T, H, C), key (B, W + T, G, C) and value (B, W + T, G, k) with G a "
            f"divisor of H and W >= 1, older (B, T, H, k) and gate (H) or (B, T, H), found query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, older {tuple(older.shape)}, gate {tuple(gate.shape)}"
            + (f", bias {tuple(bias.shape)} for (H, W)." if bias is not None else ".")
        )
