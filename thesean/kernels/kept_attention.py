"""Softmax attention over the tokens with the highest scores of all that came, in memory that does not grow.

B batch, T time, H heads, G heads of keys and values, C width of queries and keys, k = K + 1 columns of the values,
X = C + 1 + k columns of a token, M tokens that are kept, L tokens of a block, J = M + L that it sees
"""

from __future__ import annotations

import torch

from thesean.kernels.shared.blocks import blocks
from thesean.kernels.shared.precision import full_precision, wide

# Tokens that are looked at together: who is kept at each of them is found by comparing all pairs.
BLOCK = 64

# Scores from here on don't fall with time. A float32 still tells thousandths apart there.
LASTING = 4096.0


def kept_attention(
    query_BTHC: torch.Tensor,
    new_BTGX: torch.Tensor,
    kept_BMGX: torch.Tensor,
    *,
    fade: int = 0,
    block: int = BLOCK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At each step the new token comes in, and of all up to it the M with the highest scores stay, the earlier one of
    equals; over these sum f exp(q.k - top) v -> (sums_BTHk, top_BTH, kept_BMGX).

    Where M stay, f = min(1, score - the least score of these), so that a token has faded when another takes its place:
    which of two near ones is kept, a matter of rounding, makes a difference as small as theirs. Else f = 1.

    Where `fade` > 0, the scores of those that are kept are less by 1 / fade with each token that comes: a score is then
    how long a token is worth its place, and the kept rows hold what is left of it. All fall alike, so that of two
    tokens it never changes which scores more, and at any length numbers stay small; but those from LASTING on, far
    above the others, don't fall.

    A token is a row of its key (C), its score, and its value, whose last column is 1; a row where that is 0 holds none.
    Kept ones are in the order in which they came, after the rows that hold none.
    `top` is the largest q.k + log f, or the smallest float where nothing is kept. T steps at once equal T single steps:
    who is kept depends on scores alone, so that it is known without a step after the other. Linear in T, `block` tokens
    at a time; half precision is computed in float32. Scores get no gradient (as the heavy hitters of Zhang et al. 2023,
    H2O, whose scores are the attention that was met so far). Raises ValueError for shapes that do not fit.
    """
    _check(query_BTHC, new_BTGX, kept_BMGX)
    sums, tops = [], []
    with full_precision(query_BTHC.device):
        for query_BLHC, new_BLGX in zip(blocks(query_BTHC, block, 1), blocks(new_BTGX, block, 1), strict=True):
            sums_BLHk, top_BLH, kept_BMGX = _block(query_BLHC, new_BLGX, kept_BMGX, fade)
            sums.append(sums_BLHk)
            tops.append(top_BLH)
    return torch.cat(sums, 1), torch.cat(tops, 1), kept_BMGX


def kept_attention_reference(
    query_BTHC: torch.Tensor, new_BTGX: torch.Tensor, kept_BMGX: torch.Tensor, *, fade: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `kept_attention` must equal: one token at a time, one row and head after the other, places in any order."""
    width, kept = query_BTHC.shape[3], kept_BMGX.clone()
    repeats = query_BTHC.shape[2] // new_BTGX.shape[2]
    sums_BTHk = query_BTHC.new_zeros(*query_BTHC.shape[:3], new_BTGX.shape[3] - width - 1)
    top_BTH = torch.full_like(sums_BTHk[..., 0], torch.finfo(sums_BTHk.dtype).min)
    for b in range(len(kept)):
        for g in range(kept.shape[2]):
            rows = [row for row in kept[b, :, g] if row[-1] > 0]
            at = torch.arange(kept.shape[3]) == width
            for t, new in enumerate(new_BTGX[b, :, g]):
                if new[-1] > 0:
                    rows = [row - at.to(row) / fade if fade and row[width] < LASTING else row for row in rows]
                    rows.append(new)
                if len(rows) > kept.shape[1]:
                    # the least, the last of equals
                    rows.pop(min(range(len(rows)), key=lambda i: (rows[i][width].item(), -i)))
                for h in range(g * repeats, (g + 1) * repeats) if rows else ():
                    held = torch.stack(rows)
                    scores = held[:, :width] @ query_BTHC[b, t, h]
                    if len(rows) == kept.shape[1]:
                        scores = scores + (held[:, width] - held[:, width].min()).detach().clamp_max(1).log()
                    if scores.max().isinf():  # the one that is kept has faded
                        continue
                    top_BTH[b, t, h] = scores.max()
                    sums_BTHk[b, t, h] = (scores - scores.max()).exp() @ held[:, width + 1 :]
            empty = kept.new_zeros(kept.shape[1] - len(rows), kept.shape[3])
            kept[b, :, g] = torch.cat([torch.stack(rows), empty]) if rows else empty
    return sums_BTHk, top_BTH, kept


def _block(
    query_BLHC: torch.Tensor, new_BLGX: torch.Tensor, kept_BMGX: torch.Tensor, fade: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width, groups, kept = query_BLHC.shape[3], new_BLGX.shape[2], kept_BMGX.shape[1]
    all_BGJX = torch.cat([kept_BMGX, new_BLGX.to(kept_BMGX.dtype)], 1).transpose(1, 2)
    score_BGJ, holds_BGJ = wide(all_BGJX[..., width].detach()), all_BGJX[..., -1] > 0
    gone_BGJ = _gone(score_BGJ, holds_BGJ, kept, fade)
    raised_BGJ = score_BGJ + gone_BGJ
    stays_BGLJ = _stays(raised_BGJ, holds_BGJ, kept)
    row_BGJX, query_BLHC = wide(all_BGJX), wide(query_BLHC)
    query_BGRLC = query_BLHC.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    scores_BGRLJ = query_BGRLC @ row_BGJX[..., :width].unsqueeze(2).mT
    scores_BGRLJ = scores_BGRLJ + _faded(raised_BGJ, stays_BGLJ, kept).log().unsqueeze(2)
    top_BGRL = scores_BGRLJ.detach().amax(-1).clamp_min(torch.finfo(scores_BGRLJ.dtype).min)
    weights_BGRLJ = (scores_BGRLJ - top_BGRL.unsqueeze(-1)).exp()
    sums_BGRLk = weights_BGRLJ @ row_BGJX[..., width + 1 :].unsqueeze(2)
    order_J = torch.arange(1, all_BGJX.shape[2] + 1, device=all_BGJX.device)
    last_BGM = (stays_BGLJ[:, :, -1] * order_J).topk(kept, -1)
    order_BGM, place_BGM = last_BGM.values.flip(-1), last_BGM.indices.flip(-1)
    if fade:
        left_BGJ1 = (score_BGJ + (gone_BGJ - gone_BGJ[..., -1:])).unsqueeze(-1).to(all_BGJX.dtype)
        all_BGJX = torch.cat([all_BGJX[..., :width], left_BGJ1, all_BGJX[..., width + 1 :]], -1)
    held_BGMX = all_BGJX.gather(2, place_BGM.unsqueeze(-1).expand(-1, -1, -1, all_BGJX.shape[3]))
    held_BGMX = held_BGMX * (order_BGM > 0).unsqueeze(-1).to(held_BGMX.dtype)
    return (
        sums_BGRLk.permute(0, 3, 1, 2, 4).flatten(2, 3),
        top_BGRL.permute(0, 3, 1, 2).flatten(2),
        held_BGMX.transpose(1, 2),
    )


def _gone(score_BGJ: torch.Tensor, holds_BGJ: torch.Tensor, kept: int, fade: int) -> torch.Tensor:
    """What scores of kept tokens have lost when a token comes, and in the end those that last, as if they had: so much
    more than at the block's start is a later score worth.
    """
    if not fade:
        return torch.zeros_like(score_BGJ[..., :1])
    came_BGJ = (holds_BGJ & (torch.arange(score_BGJ.shape[-1], device=score_BGJ.device) >= kept)).cumsum(-1)
    return torch.where(score_BGJ < LASTING, came_BGJ, came_BGJ[..., -1:]) / fade


def _stays(score_BGJ: torch.Tensor, held_BGJ: torch.Tensor, kept: int) -> torch.Tensor:
    """Whether a token is among the `kept` best after each of the last L came, (B, G, L, J)."""
    tokens = score_BGJ.shape[-1]
    row_J = torch.arange(tokens, device=score_BGJ.device)
    higher_BGJJ = score_BGJ.unsqueeze(-1) > score_BGJ.unsqueeze(-2)
    equal_BGJJ = score_BGJ.unsqueeze(-1) == score_BGJ.unsqueeze(-2)
    beats_BGJJ = higher_BGJJ | (equal_BGJJ & (row_J.unsqueeze(1) < row_J))
    came_LJ = row_J <= row_J[kept:].unsqueeze(1)
    here_BGLJ = held_BGJ.unsqueeze(-2) & came_LJ
    better_BGLJ = here_BGLJ.to(torch.float32) @ beats_BGJJ.to(torch.float32)
    return here_BGLJ & (better_BGLJ < kept)


def _faded(score_BGJ: torch.Tensor, stays_BGLJ: torch.Tensor, kept: int) -> torch.Tensor:
    """How much of each token counts: none of those that don't stay."""
    score_BG1J = score_BGJ.unsqueeze(-2)
    least_BGL1 = score_BG1J.masked_fill(~stays_BGLJ, torch.inf).amin(-1, keepdim=True)
    is_full_BGL1 = stays_BGLJ.sum(-1, keepdim=True) == kept
    return (score_BG1J - least_BGL1).masked_fill(~is_full_BGL1, torch.inf).clamp(0, 1) * stays_BGLJ


def _check(query: torch.Tensor, new: torch.Tensor, kept: torch.Tensor) -> None:
    fits = query.ndim == new.ndim == kept.ndim == 4 and query.shape[:2] == new.shape[:2] and query.shape[1] > 0
    fits = fits and new.shape[0] == kept.shape[0] and new.shape[2:] == kept.shape[2:] and kept.shape[1] > 0
    fits = fits and query.shape[2] % new.shape[2] == 0 and new.shape[3] >= query.shape[3] + 2
    if not fits:
        raise ValueError(
            "kept_attention: expected query (B, T, H, C), new tokens (B, T, G, C + 1 + k) and kept ones (B, M, G, "
            f"C + 1 + k) with G a divisor of H, T >= 1 and M >= 1, found query {tuple(query.shape)}, new "
            f"{tuple(new.shape)} and kept {tuple(kept.shape)}."
        )
