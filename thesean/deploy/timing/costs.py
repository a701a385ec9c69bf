"""What files cost to serve, side by side: latency, state and memory at several numbers of rows and tokens.

B batch, T time
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from thesean.deploy.quantizing.quantized import start_of
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays
from thesean.deploy.timing.latency import FileTimings, Timing, latency_of_models, random_feeds
from thesean.deploy.timing.peak_memory import Footprint, footprints
from thesean.passes.graph.signature import Signature

logger = logging.getLogger(__name__)

_TOGETHER_MIB = 4096  # that files which take turns may hold between their turns


@dataclass(frozen=True, kw_only=True)
class FileCosts:
    """One file at `batch` rows of `length` tokens, None where there is no time dimension; then `prefill` is its one
    forward. None for what does not run there.
    """

    batch: int
    length: int | None
    prefill: Timing | None
    token: Timing | None
    footprint: Footprint | None


def costs_of_files(
    paths: Mapping[str, Path], signature: Signature, lengths: Sequence[int], batches: Sequence[int], repeats: int
) -> tuple[dict[str, list[FileCosts]], dict[str, str | None]]:
    """By the files' names, and how each makes a token, as in FileTimings. Latencies are of all files that run at a
    place, in turns, on one thread; what has no batch or time dimension is measured once. Raises ExportError for a file
    that onnxruntime can't load.
    """
    timed = bool(signature.lengths)
    sizes: list[int | None] = [*sorted(set(lengths))] if timed else [None]
    rows = sorted(set(batches)) if "batch" in signature.symbols else [signature.fixed_rows or 1]
    found: dict[str, list[FileCosts]] = {name: [] for name in paths}
    kinds: dict[str, str | None] = {}
    for batch in rows:
        held = {name: _footprints(path, signature, batch, sizes) for name, path in paths.items()}
        for n, length in enumerate(sizes):
            logger.info("measuring %d files at batch %d%s", len(paths), batch, f", {length} tokens" if length else "")
            here = {name: found_here for name, f in held.items() if (found_here := f[n]) is not None}
            # files that wait for their turn keep what their last run needed
            lean = sum(f.peak_mib or 0.0 for f in here.values()) > _TOGETHER_MIB
            running = {name: path for name, path in paths.items() if name in here}
            contexts = [] if length is None else [length]
            timings = latency_of_models(running, signature, contexts, batch, repeats, lean=lean) if running else {}
            for name in paths:
                taken = timings.get(name)
                kinds[name] = kinds.get(name) or (taken.token_kind if taken is not None else None)
                found[name].append(_costs(batch, length, taken, here.get(name)))
    return found, kinds


def _costs(batch: int, length: int | None, taken: FileTimings | None, footprint: Footprint | None) -> FileCosts:
    if taken is None or length is None:
        prefill, token = (None if taken is None else taken.forward), None
    else:
        prefill, token = taken.prefill.get(length), taken.token.get(length)
    return FileCosts(batch=batch, length=length, prefill=prefill, token=token, footprint=footprint)


def _footprints(path: Path, signature: Signature, batch: int, lengths: Sequence[int | None]) -> list[Footprint | None]:
    """Of an encoder-decoder both files': a server holds them, and what the one gives the other, as it holds states."""
    session = Session(path, threads=1)
    runs: list[tuple[Arrays, Arrays | None]] = []
    of_source: list[tuple[Arrays, Arrays | None]] = []
    held = []
    for length in lengths:
        every = random_feeds(signature, batch, length)
        feeds, one = session.step_after(every, every), None
        if session.is_stateful:
            first = random_feeds(signature, batch, 1)
            step = {n: feeds[n] if n in session.held else first[n] for n in feeds}
            one = {**step, **{n: v for n, v in start_of(session, step).items() if n not in session.states}}
        runs.append(({**feeds, **start_of(session, feeds)}, one))
        if session.held:
            of_source.append(({n: every[n] for n in session.encoder.inputs}, None))
        held.append(sum(feeds[n].nbytes for n in session.held))
    beside = session.encoder.path if session.held else None
    del session  # its memory isn't the other process's
    found = footprints(path, runs)
    if beside is None:
        return found
    return [_both(*pair) for pair in zip(found, footprints(beside, of_source), held, strict=True)]


def _both(decoder: Footprint | None, encoder: Footprint | None, held: int) -> Footprint | None:
    if decoder is None or encoder is None:
        return None
    peaks = [f.peak_mib for f in (decoder, encoder) if f.peak_mib is not None]
    return Footprint(peak_mib=sum(peaks) if len(peaks) == 2 else None, state_bytes=decoder.state_bytes + held)
