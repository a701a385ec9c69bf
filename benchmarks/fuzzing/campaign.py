"""Runs of the fuzzer, each in a process that it may take down, guided by what earlier runs came by.

A run that comes by a pair of branches of the loader that none did before (`reached.py`), or is refused in new words, is
kept, and later runs alter what it left: a run is a chain of numbers, so that it can be had again.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import time
import zlib
from collections.abc import Iterable
from importlib import import_module

import torch

import thesean
from benchmarks.fuzzing.altered import sources
from benchmarks.fuzzing.reached import Reached, telling
from benchmarks.fuzzing.trial import Watch, kind, outcome

Chain = tuple[int, ...]
KINDS = ("refused", "loaded", "late", "slow", "foreign", "wrong", "executed", "changed", "died")
FAULTS = KINDS[4:]
_AT_ONCE = 1000  # runs of one process
_SECONDS, _BYTES = 20, 12 * 2**30  # of the processor's that a run may take, and a process's address space
_WAITS = 900  # seconds of the clock
_LONGEST = 8  # numbers of a chain
_WORDS = 1 << 60  # beside pairs of branches

# What was found once: a run of each must be refused, or be harmless, for ever.
FOUND: tuple[Chain, ...] = ((6761, 44629, 320951),)  # 64 as a dtype


class Corpus:
    """The chains that came by something new, all that was come by, and which of the chains were not refused."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self.seen: set[int] = set()
        self.loaded: list[Chain] = []

    def chosen(self, number: int) -> Chain:
        """What run `number` alters: a folder as it was, what a late run left, or any, or one that still loads."""
        chance = random.Random(f"choice {number}")
        kept = chance.choice(([], self.chains[-100:], self.chains, self.loaded))
        return (*chance.choice(kept)[: _LONGEST - 1], number) if kept else (number,)

    def add(self, chain: Chain, text: str, reached: Iterable[int]) -> set[int]:
        """Keep it where it is new; what of it is."""
        new = set(reached) - self.seen
        if new:
            self.seen |= new
            self.chains.append(chain)
            if not text.startswith("refused"):
                self.loaded.append(chain)
        return new


def outcomes(
    runs: Iterable[int | Chain],
    until: float = float("inf"),
    corpus: Corpus | None = None,
) -> dict[Chain, str]:
    """Of runs, in processes of their own, as far as they come by then (time.monotonic). A number is chosen for by the
    corpus, which grows; a chain is that chain.
    """
    corpus = Corpus() if corpus is None else corpus
    left = list(runs)
    telling()  # here, and not in each process
    found: dict[Chain, str] = {}
    while left and time.monotonic() < until:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(left[:_AT_ONCE], writer, until, corpus)
        os.close(writer)
        at: Chain | None = None
        begun, is_loaded = 0, False
        with os.fdopen(reader, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if "chain" in row:
                    at, begun, is_loaded = tuple(row["chain"]), begun + 1, False
                    continue
                if "loaded" in row:
                    is_loaded = True
                    continue
                assert at is not None
                found[at] = row["outcome"]
                corpus.add(at, row["outcome"], row["new"])
                at = None
        _, status = os.waitpid(child, 0)
        if at is not None:
            found[at] = f"died: signal {status & 127}, status {status >> 8}"
            if is_loaded and status & 127 == signal.SIGPROF:
                found[at] = f"slow: more than {_SECONDS} s after it was loaded"
        if not begun:
            break
        left = left[begun:]
    return found


def _work(runs: list[int | Chain], writer: int, until: float, corpus: Corpus) -> None:
    """In the child: tells each run before it begins, and what came of it."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)

    def is_loaded() -> None:
        os.write(writer, b'{"loaded": true}\n')

    reached, watch = Reached(), Watch()
    reached.watch()
    gc.freeze()  # what is there stays: a collection would write to each of its pages
    try:
        for run in runs:
            if time.monotonic() > until:
                break
            chain = corpus.chosen(run) if isinstance(run, int) else run
            os.write(writer, (json.dumps({"chain": chain}) + "\n").encode())
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # whose default is to end the process
            signal.alarm(_WAITS)
            reached.clear()
            text = outcome(chain, watch, is_loaded)
            pairs = reached.pairs
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            new: set[int] = set()
            if not text.startswith(FAULTS):
                new = corpus.add(chain, text, pairs | {_WORDS + zlib.crc32(kind(text).encode())})
            os.write(writer, (json.dumps({"outcome": text[:300], "new": sorted(new)}) + "\n").encode())
        os._exit(0)
    finally:
        os._exit(1)


def warm_up() -> None:
    """What a process imports at its first load, or for one operator in thousands: seconds, which a thousand processes
    need not take again, and what those modules do where they are imported isn't a folder's doing.
    """
    for name in ("sympy", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch._inductor", "transformers"):
        import_module(name)
    for folder in sources():
        loaded = thesean.load(folder)
        with torch.no_grad():
            loaded(**loaded.signature.random_inputs(dict.fromkeys(loaded.signature.symbols, 4)))
