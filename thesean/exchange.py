"""Tensors that the ranks of a run send each other: see ranks.py. In a process by itself each is what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from thesean import ranks

Held = TypeVar("Held")


def gather(x: torch.Tensor, dim: int = 0, kind: str = "rows", to: int | None = None) -> torch.Tensor:
    """The rows of all ranks, in their order, along a dimension in which they may have different numbers of them; `to`
    one rank alone, and the others have their own.

    Only for what every rank then computes the same of: a rank's rows of the gradient are taken as they are.
    """
    return x if (world := ranks.world()) is None else _Gather.apply(x, dim, kind, world, to)


def place(rows: int) -> tuple[int, int]:
    """How many rows the ranks before this one have, where it has so many, and how many all have."""
    if (world := ranks.world()) is None:
        return 0, rows
    sizes = _sizes(rows, world)
    return sum(sizes[: world.number]), sum(sizes)


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of what each made of its own rows, where all compute the same of it: the gradient goes to a
    rank's own summand as it is.
    """
    return x if ranks.world() is None else _Total.apply(x)


def add_up(tensors: Sequence[torch.Tensor], kind: str = "sums") -> None:
    """The sums over ranks, in place. All of one dtype travel together."""
    if ranks.world() is None:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for some in by_dtype.values():
        flat = torch.cat([t.detach().reshape(-1) for t in some])
        ranks.count_sent(kind, flat)
        with ranks.reaching():
            torch.distributed.all_reduce(flat)
        for tensor, total in zip(some, flat.split([t.numel() for t in some]), strict=True):
            tensor.copy_(total.view_as(tensor))


def share_of(flat: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's slice of a vector. All ranks' are of one length: the last ones are filled up with zeros."""
    if (world := ranks.world()) is None:
        return flat.clone()
    each = -(-flat.numel() // world.count)
    own = flat[world.number * each : (world.number + 1) * each]
    return torch.cat([own, own.new_zeros(each - own.numel())])


def gather_shares(own: torch.Tensor, into: torch.Tensor, kind: str = "weights") -> None:
    """Writes all ranks' slices into a vector."""
    if (world := ranks.world()) is None:
        into.copy_(own)
        return
    held = own.detach().view(torch.uint8)  # as bytes: not every backend knows every dtype
    found = held.new_empty(world.count, held.numel())
    ranks.count_sent(kind, held)
    with ranks.reaching():
        torch.distributed.all_gather(list(found), held)
    into.copy_(found.view(-1).view(own.dtype)[: into.numel()])


def sum_shares(flat: torch.Tensor, kind: str = "gradients") -> torch.Tensor:
    """This rank's slice of the sum of all ranks' vectors."""
    if (world := ranks.world()) is None:
        return flat
    each = -(-flat.numel() // world.count)
    padded = torch.cat([flat.detach(), flat.new_zeros(each * world.count - flat.numel())])
    own = flat.new_empty(each)
    ranks.count_sent(kind, flat)
    with ranks.reaching():
        torch.distributed.reduce_scatter_tensor(own, padded)
    return own


def added(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The sum over ranks, apart from what was given; without a gradient."""
    found = x.detach().clone()
    add_up([found], kind)
    return found


def hand_out(value: torch.Tensor, owner: int, kind: str = "results") -> None:
    """Every rank's tensor becomes that of one rank."""
    if (world := ranks.world()) is None:
        return
    held = value.contiguous().reshape(-1).view(torch.uint8)  # not every backend knows every dtype
    with ranks.reaching():
        torch.distributed.broadcast(held, owner)
    if owner == world.number:
        ranks.count_sent(kind, held)
    else:
        value.copy_(held.view(value.dtype).view(value.shape))


def at_first(own: Held) -> list[Held]:
    """What all ranks have, on the first one, which writes it; on others what they have themselves."""
    if (world := ranks.world()) is None:
        return [own]
    found: list[Any] = [None] * world.count
    with ranks.reaching():
        torch.distributed.gather_object(own, found if ranks.is_first() else None)
    return found if ranks.is_first() else [own]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, kind: str, world: ranks.World, to: int | None) -> torch.Tensor:
        sizes = _sizes(x.shape[dim], world)
        ctx.dim, ctx.start, ctx.length = dim, sum(sizes[: world.number]), x.shape[dim]
        own = x.detach().movedim(dim, 0).contiguous()
        # as bytes: not every backend knows every dtype; and of one length, which collectives ask for
        width = own[:1].numel() if len(own) else own.new_empty(1, *own.shape[1:]).numel()
        most = max(sizes) * width * own.element_size()
        padded = own.new_zeros(most, dtype=torch.uint8)
        held = own.reshape(-1).view(torch.uint8)
        padded[: held.numel()] = held
        theirs = [torch.empty_like(padded) for _ in range(world.count if to in (None, world.number) else 0)]
        if to != world.number:
            ranks.count_sent(kind, held)
        with ranks.reaching():
            if to is None:
                torch.distributed.all_gather(theirs, padded)
            else:
                torch.distributed.gather(padded, theirs or None, to)
        if not theirs:
            return x
        pieces = [
            piece[: n * width * own.element_size()].view(own.dtype).view(n, *own.shape[1:])
            for piece, n in zip(theirs, sizes, strict=True)
        ]
        return torch.cat(pieces).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].narrow(ctx.dim, ctx.start, ctx.length), None, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return added(x, "totals")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _sizes(rows: int, world: ranks.World) -> list[int]:
    """Of all ranks."""
    own = torch.tensor([rows], device=world.device)
    found = [torch.empty_like(own) for _ in range(world.count)]
    with ranks.reaching():
        torch.distributed.all_gather(found, own)
    return [int(n) for n in found]
