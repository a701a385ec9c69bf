"""One measure over the batches of all processes: nonlinear measures of parts don't average to that of the whole.

N examples of this process, M of all, P width
"""

from __future__ import annotations

import torch
from torch import distributed
from torch.nn.functional import pad

from thesean.errors import DataError


def gather_rows(x_NP: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks. x_NP -> x_MP; N may differ, P and dtype may not.

    The gradient flows into this process's own rows and needs no communication, so no process waits for another's
    backward pass. Outside a process group the rows are returned as they are. Raises DataError where widths differ.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return x_NP
    world, rank = distributed.get_world_size(), distributed.get_rank()
    shape = torch.tensor(x_NP.shape, device=x_NP.device)
    shapes = [torch.empty_like(shape) for _ in range(world)]
    distributed.all_gather(shapes, shape)
    sizes = [tuple(int(n) for n in s) for s in shapes]
    if len({p for _, p in sizes}) > 1:  # the same on all ranks, so that all of them stop here
        raise DataError(f"gather=True: expected one width in all processes, found {[p for _, p in sizes]} by rank.")
    longest = max(n for n, _ in sizes)
    padded_NP = pad(x_NP.detach(), (0, 0, 0, longest - x_NP.shape[0])).contiguous()
    parts = [torch.empty_like(padded_NP) for _ in range(world)]
    distributed.all_gather(parts, padded_NP)
    cut = [part_NP[:n] for part_NP, (n, _) in zip(parts, sizes, strict=True)]
    cut[rank] = x_NP
    return torch.cat(cut)
