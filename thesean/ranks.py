"""Several processes at one conversion, "ranks", each with its share of every batch: `accelerate launch` or `torchrun`.

Every rank runs the same program on the same batches and takes its own rows through guide and hybrid. Whatever is a
function of a whole batch (a similarity, the user's loss, the statistics of a ridge solve) is computed on the rows of
all, so that it is what one process would have computed, and the same on each rank. That decides how gradients add up:
each rank has the whole loss, `gather` hands back the gradient of its own rows alone, and the sum over ranks is the
gradient of one process. A mean of losses of each rank's own rows would be another objective. Parts that are aligned
each by itself are a rank's own instead, on all rows: distill/spread.py.

In a process by itself nothing here does anything, and neither Accelerate nor torch.distributed is imported.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from thesean.errors import MissingExtraError, RankError, TheseanError

Value = TypeVar("Value")

# How long a rank waits for another that doesn't answer; one that is gone is noticed at once. The first rank saves,
# exports and chooses while the others wait.
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class _World:
    count: int
    number: int
    device: torch.device  # of what is sent


_world: _World | None = None
_sent: dict[str, int] = {}


def launched() -> int:
    """How many processes a launcher started this one with, or the caller's own process group has."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() else 1


def leads() -> bool:
    """Whether this process is the one that writes and speaks, inside of `joined` or not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(model: Any) -> Iterator[None]:
    """Inside, the processes that were launched together are one run's ranks, and talk over the device that the guide
    is on. Raises MissingExtraError without Accelerate, RankError.
    """
    global _world
    if launched() == 1 or _world is not None:
        yield
        return
    _sent.clear()
    _world = _opened(not any(p.is_cuda for p in getattr(model, "parameters", list)()))
    try:
        yield
    finally:
        _world = None


def _opened(cpu: bool) -> _World:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "dist") from error
    wrapped = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if wrapped or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise RankError(
            "the launcher was told to wrap the model in FSDP or DeepSpeed, which train modules that own their weights: "
            "a graph's parts are solved and read between steps. Launch with --multi_gpu alone, and shard by the "
            "recipe: sharded: true, or --sharded."
        )
    own = not torch.distributed.is_initialized()
    with reaching():
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=_TIMEOUT_S))
    if own:
        atexit.register(_leave)
    return _World(state.num_processes, state.process_index, torch.device("cpu") if cpu else state.device)


def _leave() -> None:
    with suppress(Exception):  # the others may be gone
        torch.distributed.destroy_process_group()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process is by itself: it has whole batches, and tells nobody."""
    global _world
    before, _world = _world, None
    try:
        yield
    finally:
        _world = before


def count() -> int:
    return 1 if _world is None else _world.count


def is_first() -> bool:
    """Whether this rank is the one that writes and speaks."""
    return _world is None or _world.number == 0


def own_rows(rows: int) -> slice:
    """This rank's share of so many rows; those of all ranks, one after the other, are all rows."""
    if _world is None:
        return slice(0, rows)
    return slice(_world.number * rows // _world.count, (_world.number + 1) * rows // _world.count)


def sent() -> dict[str, int]:
    """Bytes of its own that this rank gave to others in its last run, by kind: see docs/scaling.md."""
    return dict(_sent)


def number() -> int:
    """This rank's, from 0."""
    return 0 if _world is None else _world.number


def owner_of(number: int, count: int) -> int:
    """The rank whose share, as `own_rows` has it, holds this one of so many."""
    return 0 if _world is None else ((number + 1) * _world.count - 1) // count


def gather(x: torch.Tensor, dim: int = 0, kind: str = "rows", to: int | None = None) -> torch.Tensor:
    """The rows of all ranks, in their order, along a dimension in which they may have different numbers of them; `to`
    one rank alone, and the others have their own.

    Only for what every rank then computes the same of: a rank's rows of the gradient are taken as they are.
    """
    return x if _world is None else _Gather.apply(x, dim, kind, _world, to)


def place(rows: int) -> tuple[int, int]:
    """How many rows the ranks before this one have, where it has so many, and how many all have."""
    if _world is None:
        return 0, rows
    sizes = _sizes(rows, _world)
    return sum(sizes[: _world.number]), sum(sizes)


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of what each made of its own rows, where all compute the same of it: the gradient goes to a
    rank's own summand as it is.
    """
    return x if _world is None else _Total.apply(x)


def everywhere(check: Callable[[], None]) -> None:
    """Raises on every rank what a check of its own rows raises on any of them."""
    if _world is None:
        check()
        return
    found = None
    try:
        check()
    except TheseanError as error:
        found = error
    if not any_of(found is not None):
        return
    raise next(error for error in _everyones(found, _world) if error is not None)


def add_up(tensors: Sequence[torch.Tensor], kind: str = "sums") -> None:
    """The sums over ranks, in place. All of one dtype travel together."""
    if _world is None:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for some in by_dtype.values():
        flat = torch.cat([t.detach().reshape(-1) for t in some])
        count_sent(kind, flat)
        with reaching():
            torch.distributed.all_reduce(flat)
        for tensor, total in zip(some, flat.split([t.numel() for t in some]), strict=True):
            tensor.copy_(total.view_as(tensor))


def share_of(flat: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's slice of a vector. All ranks' are of one length: the last ones are filled up with zeros."""
    if _world is None:
        return flat.clone()
    each = -(-flat.numel() // _world.count)
    own = flat[_world.number * each : (_world.number + 1) * each]
    return torch.cat([own, own.new_zeros(each - own.numel())])


def gather_shares(own: torch.Tensor, into: torch.Tensor, kind: str = "weights") -> None:
    """Writes all ranks' slices into a vector."""
    if _world is None:
        into.copy_(own)
        return
    held = own.detach().view(torch.uint8)  # as bytes: not every backend knows every dtype
    found = held.new_empty(_world.count, held.numel())
    count_sent(kind, held)
    with reaching():
        torch.distributed.all_gather(list(found), held)
    into.copy_(found.view(-1).view(own.dtype)[: into.numel()])


def sum_shares(flat: torch.Tensor, kind: str = "gradients") -> torch.Tensor:
    """This rank's slice of the sum of all ranks' vectors."""
    if _world is None:
        return flat
    each = -(-flat.numel() // _world.count)
    padded = torch.cat([flat.detach(), flat.new_zeros(each * _world.count - flat.numel())])
    own = flat.new_empty(each)
    count_sent(kind, flat)
    with reaching():
        torch.distributed.reduce_scatter_tensor(own, padded)
    return own


def added(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The sum over ranks, apart from what was given; without a gradient."""
    found = x.detach().clone()
    add_up([found], kind)
    return found


def agreed(*values: float) -> tuple[float, ...]:
    """The first rank's numbers: whatever decides how a run goes on must be the same everywhere, to the last bit."""
    if _world is None:
        return values
    told = torch.tensor(values, dtype=torch.float64, device=_world.device)
    with reaching():
        torch.distributed.broadcast(told, 0)
    return tuple(told.tolist())


def any_of(flag: bool) -> bool:
    """Whether it is true of any rank."""
    if _world is None:
        return flag
    told = torch.tensor([float(flag)], device=_world.device)
    with reaching():
        torch.distributed.all_reduce(told)
    return bool(told.item() > 0)


def first(compute: Callable[[], Value]) -> Value:
    """What it gives on the first rank, which alone runs it, by itself; or the error that it raises there."""
    if _world is None:
        return compute()
    found: list[Any] = [None, None]
    if is_first():
        try:
            with apart():
                found[0] = compute()
        except Exception as error:
            found[1] = error if _travels(error) else RankError(f"{type(error).__name__}: {error}")
    _broadcast(_world, found)
    if found[1] is not None:
        raise found[1]
    value: Value = found[0]
    return value


def same(facts: Callable[[], Mapping[str, str]]) -> None:
    """Raises RankError where ranks were given different things, by name."""
    if _world is None:
        return
    everyone = _everyones(dict(facts()), _world)
    for number, theirs in enumerate(everyone):
        others = [name for name, value in everyone[0].items() if theirs.get(name) != value]
        if others:
            raise RankError(
                f"rank {number} and rank 0 were given different things: {', '.join(others)}. Each has to be given the "
                "same guide, settings and batches, in the same order, of which it takes its own rows: load or seed "
                "them alike."
            )


def tells(error: Exception) -> bool:
    """Whether this process is the first one with this error: what happens to all of them is told once."""
    if launched() == 1:
        return True
    text = type(error).__name__ if isinstance(error, RankError) else str(error)
    with suppress(Exception):  # who kept the list may be gone
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*place, is_master=False, timeout=timedelta(seconds=2))
        return store.add(f"thesean/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{text}", 1) == 1
    return True


def count_sent(kind: str, tensor: torch.Tensor) -> None:
    """For `sent`: this rank gives that to others."""
    _sent[kind] = _sent.get(kind, 0) + tensor.nbytes


@contextmanager
def reaching() -> Iterator[None]:
    """Raises RankError where another rank can't be reached."""
    try:
        yield
    except RuntimeError as error:
        why = re.sub(r"^\[[^]]*\]\s*", "", str(error).splitlines()[0]).partition(". ")[
            0
        ]  # without gloo's own source line
        raise RankError(
            f"another process of this run is gone, or hasn't answered for {_TIMEOUT_S // 60} minutes: what it said "
            "itself, if anything, tells why. Launch the job again, with as many processes as you like: in a workdir it "
            f"goes on from its last checkpoint. ({why})"
        ) from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, kind: str, world: _World, to: int | None) -> torch.Tensor:
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
            count_sent(kind, held)
        with reaching():
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


def _sizes(rows: int, world: _World) -> list[int]:
    """Of all ranks."""
    own = torch.tensor([rows], device=world.device)
    found = [torch.empty_like(own) for _ in range(world.count)]
    with reaching():
        torch.distributed.all_gather(found, own)
    return [int(n) for n in found]


def _everyones(own: Any, world: _World) -> list[Any]:
    found: list[Any] = [None] * world.count
    with reaching():
        torch.distributed.all_gather_object(found, own)
    return found


def _broadcast(world: _World, objects: list[Any]) -> None:
    with reaching():
        torch.distributed.broadcast_object_list(objects, 0, device=world.device)


def _travels(error: Exception) -> bool:
    """Whether it is the same on the other side: some can't be made from their message alone."""
    with suppress(Exception):
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    return False
