"""Several processes at one conversion, "ranks", each with its share of every batch: `accelerate launch` or `torchrun`.

Every rank runs the same program on the same batches and takes its own rows through guide and hybrid. Whatever is a
function of a whole batch (a similarity, the user's loss, the statistics of a ridge solve) is computed on the rows of
all, so that it is what one process would have computed, and the same on each rank. That decides how gradients add up:
each rank has the whole loss, `gather` hands back the gradient of its own rows alone, and the sum over ranks is the
gradient of one process. A mean of losses of each rank's own rows would be another objective. Parts that are aligned
each by itself are a rank's own instead, on all rows: distill/spread.py.

Who they are and what they agree on stands here, the tensors that they send each other in exchange.py. In a process by
itself nothing of either does anything, and neither Accelerate nor torch.distributed is imported.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
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
class World:
    """The ranks of a run, as one of them sees them."""

    count: int
    number: int
    device: torch.device  # of what is sent


_world: World | None = None
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


def _opened(cpu: bool) -> World:
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
    return World(state.num_processes, state.process_index, torch.device("cpu") if cpu else state.device)


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


def world() -> World | None:
    """None in a process by itself."""
    return _world


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


def _everyones(own: Any, world: World) -> list[Any]:
    found: list[Any] = [None] * world.count
    with reaching():
        torch.distributed.all_gather_object(found, own)
    return found


def _broadcast(world: World, objects: list[Any]) -> None:
    with reaching():
        torch.distributed.broadcast_object_list(objects, 0, device=world.device)


def _travels(error: Exception) -> bool:
    """Whether it is the same on the other side: some can't be made from their message alone."""
    with suppress(Exception):
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    return False
