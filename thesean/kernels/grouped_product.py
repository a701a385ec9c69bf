"""The product of each row with its group's own matrix: the experts of a mixture, whose rows come sorted by expert.

S rows, G groups, K width of a row, N width of a result; C chunks of L rows
"""

from __future__ import annotations

import torch


def grouped_product(x_SK: torch.Tensor, weight_GKN: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """y_s = x_s W_g for ends_{g-1} <= s < ends_g, and 0 for s >= ends_{G-1}. ends_G rises, from 0 on. -> y_SN.

    No size hangs on a value, so that it can be traced: each group is cut into chunks of L = S // G + 1 rows, its last
    one filled up with rows whose results nobody reads. C of them hold S rows however these are divided: one for each
    where rows are fewer than groups, and 2 G at most, so that no more than twice what is needed is multiplied and
    copied. (MegaBlocks, Gale et al. 2022, section 5, has blocks of one length, whose number then hangs on the values.)
    """
    rows, groups = x_SK.shape[0], weight_GKN.shape[0]
    length = rows // groups + 1
    chunks = (rows + groups * (length - 1)) // length
    end_G = ends_G.long()
    start_G = torch.cat([torch.zeros_like(end_G.narrow(0, 0, 1)), end_G.narrow(0, 0, groups - 1)])
    chunks_G = (end_G - start_G + (length - 1)) // length
    last_G = torch.cumsum(chunks_G, 0)
    first_G = last_G - chunks_G
    chunk_C = torch.arange(chunks, device=x_SK.device)
    row_S = torch.arange(rows, device=x_SK.device)
    of_C = (chunk_C.unsqueeze(1) >= last_G).sum(1).clamp(max=groups - 1)
    of_S = (row_S.unsqueeze(1) >= end_G).sum(1).clamp(max=groups - 1)
    begin_C = start_G[of_C] + (chunk_C - first_G[of_C]) * length
    taken_CL = (begin_C.unsqueeze(1) + torch.arange(length, device=x_SK.device)).clamp(0, rows - 1)
    y_CLN = torch.bmm(x_SK[taken_CL], weight_GKN[of_C])
    place_S = (first_G[of_S] * length + row_S - start_G[of_S]).clamp(max=chunks * length - 1)
    y_SN = y_CLN.flatten(0, 1)[place_S]
    return torch.where((row_S < end_G[-1]).unsqueeze(1), y_SN, torch.zeros_like(y_SN))
