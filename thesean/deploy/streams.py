"""Sequences that go on: a batch in chunks, and streams of tokens that come and go, packed in one batch.

B batch, T time, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, Unpack

import numpy as np

from thesean.deploy.loaded import Loaded, last_step
from thesean.deploy.sampling import Sampling, SamplingOptions
from thesean.deploy.states import Arrays, State
from thesean.errors import DataError, NumericalError

Carried = Mapping[str, np.ndarray]


class Stream:
    """A batch of sequences in chunks: call it with the inputs of one, and it gives their outputs. `state` is what the
    next chunk starts from, None at the start.

    Where a file's outputs are late, what is void at the start is left out, and `end` brings the last ones: all in a row
    are the whole sequence's.
    """

    def __init__(self, session: Loaded, state: Carried | None = None) -> None:
        self.session = session
        self.state = state
        self._void = session.delay if state is None else 0  # a state is of a stream that began before
        self._last: Arrays = {}

    def __call__(self, inputs: Arrays) -> Arrays:
        """The outputs of a chunk. Raises DataError and StateError, as `Session.run` does; the state stays then."""
        outputs, self.state = self.session.run(inputs, self.state)
        if self.session.delay:
            held, dim = self.session.held, self.session.steps_dim
            self._last = {n: value if n in held else last_step(value, dim(n)) for n, value in inputs.items()}
        return self._in_time(outputs)

    def end(self) -> Arrays:
        """The outputs that are still to come, nothing where none are late; the next chunk starts anew."""
        outputs: Arrays = {}
        if self.state is not None and self._last:
            outputs, _ = self.session.flush(self._last, self.state)
            outputs = self._in_time(outputs)
        self.state, self._void, self._last = None, self.session.delay, {}
        return outputs

    def _in_time(self, outputs: Arrays) -> Arrays:
        if not self._void:
            return outputs
        dims = {n: self.session.steps_dim(n) for n, value in outputs.items() if value.ndim > 1}
        steps = next(outputs[n].shape[dim] for n, dim in dims.items())
        cut, self._void = min(self._void, steps), max(0, self._void - steps)
        late = {n: dim for n, dim in dims.items() if outputs[n].shape[dim] == steps}
        return {n: v.take(range(cut, steps), late[n]) if n in late else v for n, v in outputs.items()}


@dataclass(eq=False)
class _Row:
    """One stream of tokens. `tokens`: its prompt while it waits, and all of them where the file carries no state."""

    tokens: list[int]
    sampling: Sampling
    random: np.random.Generator
    state: Carried | None = None
    encoded: Carried = field(default_factory=dict)  # what a decoder's file reads of the stream's source
    read_V: np.ndarray | None = None
    past: list[int] = field(default_factory=list)  # read, and not yet in `read_V`

    @property
    def source(self) -> tuple[tuple[int, ...], ...]:
        """Equal for those whose sources are as long, which can be read together."""
        return tuple(value.shape[1:] for value in self.encoded.values())

    def choose(self, logits_V: np.ndarray) -> int:
        if not self.sampling.heeds_repetition:
            return self.sampling.choose(logits_V, None, self.random)
        if self.read_V is None:
            self.read_V = np.zeros(len(logits_V), np.bool_)
        self.read_V[self.past] = True
        token = self.sampling.choose(logits_V, self.read_V, self.random)
        self.past = [token]
        return token


@dataclass(eq=False)
class _Batch:
    """Streams that are read together, in the order of the rows of their state, and the last token of each."""

    streams: list[int]
    state: Carried
    rows: list[_Row]
    last_B: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self.is_greedy = all(row.sampling == Sampling() for row in self.rows)

    @cached_property
    def encoded(self) -> Arrays:
        """Joined once, and not for each token."""
        return _joined(self.rows)

    def take(self, kept: Sequence[int], state: Carried) -> _Batch:
        return _Batch([self.streams[k] for k in kept], state, [self.rows[k] for k in kept], self.last_B[kept])

    def choose(self, logits_BV: np.ndarray) -> list[int]:
        if not self.is_greedy:
            tokens = [row.choose(logits_V) for row, logits_V in zip(self.rows, logits_BV, strict=True)]
            self.last_B = np.array(tokens)
            return tokens
        self.last_B = logits_BV.argmax(-1)  # all at once; a NaN counts as the largest
        tokens = self.last_B.tolist()
        for k, token in enumerate(tokens):
            if math.isnan(logits_BV[k, token]):
                raise NumericalError("the file's logits are NaN: no token can be chosen.")
        return tokens


def _joined(rows: Sequence[_Row]) -> Arrays:
    values = {name: [row.encoded[name] for row in rows] for name in rows[0].encoded}
    return {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in values.items()}


Read = list[tuple[_Batch, np.ndarray, State]]  # and the logits_BV and the state after it


class Streams:
    """Streams of tokens, packed in one batch: `join` with a prompt, `step` for the next token of each, `leave`.

    A row's numbers are those of the stream alone, whoever joins or leaves. Where the rows of a file can't be told apart
    (`has_rows`), each stream is read by itself.
    """

    def __init__(self, session: Loaded) -> None:
        inputs = [n for n in session.inputs if n not in session.held]
        integers = [n for n in inputs if issubclass(session.dtype(n), np.integer)]
        if not integers:
            raise DataError(f"the file takes no tokens; its inputs are: {', '.join(session.inputs)}.")
        odd = [n for n in inputs if len(session.shape(n)) != 2]
        if odd:
            raise DataError(f"input {odd[0]!r}: expected (batch, time), found {session.shape(odd[0])}: use run().")
        if session.delay:
            raise DataError(f"the file's outputs come {session.delay} steps late: no next token can be told from them.")
        logits = session.outputs[0]
        if len(session.shape(logits)) != 3:
            found = session.shape(logits)
            raise DataError(f"output {logits!r}: expected logits (batch, time, vocabulary), found the shape {found}.")
        self.session, self._gives_logits = session, logits
        self._takes_tokens, self._masks = integers[0], [n for n in inputs if n != integers[0]]
        self._carries, self._packs = session.is_stateful, session.is_stateful and session.has_rows
        self._rows: dict[int, _Row] = {}
        self._waiting: list[int] = []
        self._left = False  # whether some did since the last step
        self._batches: list[_Batch] = []
        self._names = count()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def join(
        self,
        prompt: Sequence[int],
        *,
        state: Carried | None = None,
        encoded: Carried | None = None,
        seed: int | Sequence[int] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> int:
        """A new stream, whose prompt is read by the next `step`. `state`, of one row, is what was read before;
        `encoded`, of one row, what `Session.encode` made of the source that a decoder's file reads. Raises StateError,
        and DataError for an empty prompt, ids that the file has no row of, settings that don't fit, a source where none
        is read or the other way round; UnknownNameError for a setting that there is not.
        """
        tokens, source = tokens_of(prompt), checked_source(self.session, encoded, 1)
        self.session.check_ids(self._takes_tokens, np.array(tokens))  # here, not when the others are stepped
        if state is not None:
            if not self.session.is_stateful:
                raise DataError("the file carries no state, so that a stream can't go on from one.")
            self.session.check_state(state, 1)
        try:
            random = np.random.default_rng(seed)
        except (TypeError, ValueError) as error:
            raise DataError(f"seed: expected a whole number of at least 0, found {seed!r}.") from error
        name = next(self._names)
        self._rows[name] = _Row(tokens, Sampling.of(sampling), random, state, source, past=list(tokens))
        self._waiting.append(name)
        return name

    def leave(self, stream: int) -> None:
        """The stream ends. Raises DataError for one that isn't there."""
        self._row(stream)
        del self._rows[stream]
        self._left = True

    def state(self, stream: int) -> Carried:
        """Of one row, after all that was read: its prompt, once it was stepped, and each token but the last one, with
        which the prompt of a stream that goes on from here begins. Raises DataError for a stream that isn't there.
        """
        row = self._row(stream)
        batch = next((batch for batch in self._batches if stream in batch.streams), None)
        if batch is None:
            return self.session.zero_state(1) if row.state is None else row.state
        return self.session.take_rows(batch.state, [batch.streams.index(stream)]) if self._packs else batch.state

    def step(self) -> dict[int, int]:
        """The next token of every stream. Raises DataError where the file can't read one's tokens, such as ids that it
        doesn't have; all are as they were then.
        """
        if self._left:
            self._batches, self._left = self._without_those_that_left(), False
        read: Read = [(b, *self._read(self._next_of(b), b.state, b.encoded)) for b in self._batches]
        if self._waiting:
            waiting = [stream for stream in self._waiting if stream in self._rows]
            for group in self._alike(waiting, lambda stream: self._rows[stream]):
                read += self._read_together(group) if self._packs else self._read_each(group)
        chosen: dict[int, int] = {}
        for batch, logits_BV, state in read:
            batch.state = state
            chosen.update(zip(batch.streams, batch.choose(logits_BV), strict=True))
        if self._waiting:
            self._batches, self._waiting = self._packed([batch for batch, *_ in read]), []
        if not self._carries:
            for stream, token in chosen.items():
                self._rows[stream].tokens.append(token)
        return chosen

    def _next_of(self, batch: _Batch) -> np.ndarray:
        """What it reads next, (B, T)."""
        return batch.last_B[:, None] if self._carries else np.array([row.tokens for row in batch.rows])

    def _row(self, stream: int) -> _Row:
        if stream not in self._rows:
            known = ", ".join(map(str, self._rows)) or "none"
            raise DataError(f"there is no stream {stream!r}; those that are there: {known}.")
        return self._rows[stream]

    def _without_those_that_left(self) -> list[_Batch]:
        stayed = []
        for batch in self._batches:
            rows = [k for k, stream in enumerate(batch.streams) if stream in self._rows]
            if len(rows) == len(batch.streams):
                stayed.append(batch)
            elif rows:
                stayed.append(batch.take(rows, self.session.take_rows(batch.state, rows)))
        return stayed

    def _packed(self, batches: list[_Batch]) -> list[_Batch]:
        """As one, or one for each length of sources, where that can be."""
        if not self._packs:
            return batches
        return [self._as_one(group) for group in self._alike(batches, lambda batch: batch.rows[0])]

    def _alike(self, items: list[Any], row_of: Callable[[Any], _Row]) -> list[list[Any]]:
        """Those whose sources are as long, together."""
        groups: dict[Any, list[Any]] = {}
        for item in items:
            groups.setdefault(row_of(item).source, []).append(item)
        return list(groups.values())

    def _as_one(self, batches: list[_Batch]) -> _Batch:
        if len(batches) == 1:
            return batches[0]
        streams = [stream for batch in batches for stream in batch.streams]
        rows = [row for batch in batches for row in batch.rows]
        last_B = np.concatenate([batch.last_B for batch in batches])
        return _Batch(streams, self.session.join_rows([batch.state for batch in batches]), rows, last_B)

    def _read_each(self, streams: list[int]) -> Read:
        """Prompts one by one."""
        read: Read = []
        for stream in streams:
            row = self._rows[stream]
            logits_BV, state = self._read(np.array([row.tokens]), row.state, row.encoded)
            read.append((_Batch([stream], state, [row]), logits_BV, state))
        return read

    def _read_together(self, streams: list[int]) -> Read:
        """Prompts as far as the shortest goes, then the others without it."""
        streams = sorted(streams, key=lambda stream: len(self._rows[stream].tokens))
        starts = [self._rows[stream].state for stream in streams]
        state: Carried | None = None
        if any(start is not None for start in starts):
            zeros = self.session.zero_state(1)
            state = self.session.join_rows([zeros if start is None else start for start in starts])
        read: Read = []
        done = 0
        while streams:
            rows = [self._rows[stream] for stream in streams]
            end = len(rows[0].tokens)
            logits_BV, after = self._read(np.array([row.tokens[done:end] for row in rows]), state, _joined(rows))
            ended = sum(len(row.tokens) == end for row in rows)
            took = after if ended == len(streams) else self.session.take_rows(after, range(ended))
            read.append((_Batch(streams[:ended], took, rows[:ended]), logits_BV[:ended], took))
            streams, done = streams[ended:], end
            state = self.session.take_rows(after, range(ended, len(rows))) if streams else None
        return read

    def read(
        self, chunk_BT: np.ndarray, state: Carried | None = None, encoded: Carried | None = None
    ) -> tuple[np.ndarray, State]:
        """Tokens of no stream: logits_BTV after each of them, and the state after the last. Raises DataError."""
        inputs: dict[str, Any] = {**(encoded or {}), self._takes_tokens: chunk_BT}
        for name in self._masks:
            inputs[name] = np.ones(chunk_BT.shape, self.session.dtype(name))
        outputs, after = self.session.run(inputs, state)
        return outputs[self._gives_logits], after

    def _read(self, chunk_BT: np.ndarray, state: Carried | None, encoded: Carried) -> tuple[np.ndarray, State]:
        """The logits after the last step, (B, V)."""
        logits_BTV, after = self.read(chunk_BT, state, encoded)
        return logits_BTV[:, -1], after


def tokens_of(prompt: Sequence[int]) -> list[int]:
    """Raises DataError for an empty prompt, and for what are no tokens."""
    try:
        found = np.asarray(prompt)
    except ValueError:  # a prompt among tokens
        found = np.array(None)
    if not found.size:
        raise DataError("the prompt is empty; expected at least one token.")
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or (found < 0).any():
        raise DataError("the prompt: expected a sequence of whole numbers, none below 0.")
    return [int(token) for token in found]


def prompts_of(prompts: Any) -> tuple[Sequence[Any], bool]:
    """Several prompts, or one, and whether it is one. Raises DataError for what is neither."""
    if isinstance(prompts, str | bytes | Mapping) or not hasattr(prompts, "__getitem__") or not np.shape(prompts[:1]):
        kind = type(prompts).__name__
        raise DataError(f"prompts: expected a list of token ids, or a list of such lists, found a {kind}.")
    single = not len(prompts) or not np.ndim(prompts[0])
    return [prompts] if single else prompts, single


def stops_of(stop_ids: Any) -> frozenset[int]:
    """Raises DataError for what are no tokens."""
    found = np.asarray(stop_ids)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise DataError(f"stop_ids: expected a list of token ids, found {stop_ids!r}.")
    return frozenset(found.tolist())


def checked_source(session: Loaded, encoded: Carried | None, rows: int) -> Carried:
    """What `Session.encode` made of so many rows; nothing for a file that reads no source. Raises DataError."""
    if not session.held:
        if encoded is not None:
            raise DataError("encoded: the file is no decoder's, and reads no source. Leave it out.")
        return {}
    if encoded is None:
        raise DataError("the file is a decoder's: expected encoded=session.encode({...}), its source, found none.")
    if not isinstance(encoded, Mapping):
        raise DataError(f"encoded: expected what encode() gives, arrays by name, found a {type(encoded).__name__}.")
    if missing := [n for n in session.held if n not in encoded]:
        raise DataError(f"encoded: expected {', '.join(session.held)}, found no {missing[0]}: encode() gives them.")
    found = {name: np.asarray(encoded[name]) for name in session.held}
    if other := next((n for n, v in found.items() if v.shape[:1] != (rows,)), None):
        raise DataError(
            f"encoded: expected {rows} rows, one a prompt, found {other} of the shape {found[other].shape}."
        )
    return found
