"""An ONNX file in onnxruntime: named arrays in and out, the state beside.

B batch, T time
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thesean.deploy.onnx_file import BESIDE_ENCODER, DELAY, IDS, ROWS, SIZES, TOGETHER, check_weights, metadata
from thesean.deploy.sampling import is_whole
from thesean.deploy.states import Arrays, LoadedFile, State, StateTable
from thesean.deploy.told import Beside, Late, told_as
from thesean.errors import DataError, ExportError, MissingExtraError, StateError, first_line
from thesean.passes.graph.signature import Bound
from thesean.passes.thread_state import STATE_IN, STATE_OUT
from thesean.scratch import named

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def require(*packages: str) -> None:
    """Raises MissingExtraError for the first of the extra's packages that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx")


def exactly(name: str, value: Any, dtype: type[np.generic]) -> np.ndarray:
    """An array of that dtype with the numbers that were given. Raises DataError where it can't hold them."""
    try:
        found = np.asarray(value)
        if found.dtype == dtype:
            return found
        with np.errstate(invalid="ignore", over="ignore"):
            made = found.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:  # a ragged list, words
        raise DataError(f"{name}: expected an array of numbers: {error}.") from error
    if found.dtype.kind not in "biuf":
        raise DataError(f"{name}: expected an array of numbers, found one of {found.dtype}.")
    if not issubclass(dtype, np.floating) and (other := found[made != found]).size:
        raise DataError(f"{name}: expected numbers of {np.dtype(dtype)}, found {other.flat[0]}.")
    return made


def _file(path: Any) -> Path:
    """Raises ExportError for what is no file."""
    path = named(path, "read", ExportError)
    if path.is_dir():
        raise ExportError(f"{path} is a folder; expected a file, such as {path / 'model.onnx'}.")
    if not path.exists():
        raise ExportError(f"can't read {path}: there is no such file.")
    return path


def last_step(value: np.ndarray, dim: int) -> np.ndarray:
    """Of an input, (..., 1, ...)."""
    steps = np.asarray(value)
    return steps.take([steps.shape[dim] - 1], dim)


class Loaded:
    """A thin wrapper of onnxruntime on CPU; `metadata` is what the file says of itself. Raises ExportError for a file
    that onnxruntime can't load, and for weights beside it that are missing or were changed.

    `lean`: a run that starts a sequence gives its working memory back at its end, and has to ask for it again.
    `mapped`: weights beside the file are read where they are, and take no memory of their own; products are slower.
    `delay`: how many steps late outputs come, where parts of the network look ahead; `flush` brings out the last ones.
    `held` are the inputs of a decoder that its encoder gives: the same in every call, of as many rows as the others.
    """

    def __init__(self, path: str | Path, threads: int = 1, lean: bool = False, mapped: bool = False) -> None:
        require("onnxruntime")
        import onnxruntime as ort

        path = _file(path)
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise DataError(f"threads: expected a whole number, 0 for as many as there are cores, found {threads!r}.")
        self.threads = threads
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised, not printed
        if mapped:  # else onnxruntime arranges each matrix anew, in memory
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            real = os.path.realpath(path)  # a link's target has its weights beside it, the link has not
            self._session = ort.InferenceSession(real, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            if importlib.util.find_spec("onnx") is not None:
                check_weights(Path(real), metadata(path))
            raise ExportError(f"{path}: onnxruntime can't load it: {first_line(error)}") from error
        self._giving_back = None
        if lean:
            self._giving_back = ort.RunOptions()
            self._giving_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        check_weights(Path(real), self.metadata)
        self._declared: dict[str, Any] = {i.name: i for i in self._session.get_inputs()}
        self._given: dict[str, Any] = {o.name: o for o in self._session.get_outputs()}
        self.states = tuple(n for n in self._declared if n.startswith(STATE_IN))
        self.inputs = tuple(n for n in self._declared if n not in self.states)
        self.outputs = tuple(n for n in self._given if not n.startswith(STATE_OUT))
        beside = told_as(self.metadata, BESIDE_ENCODER, Beside, Beside(file=""))
        self.held: tuple[str, ...] = beside.gives
        late = told_as(self.metadata, DELAY, Late, Late())
        self.delay, self._seen = late.steps, late.seen
        self._tables = told_as(self.metadata, IDS, dict[str, int], {})
        self._bounds = {b.name: b for b in told_as(self.metadata, SIZES, tuple[Bound, ...], ())}
        self._names = [*self.outputs, *(STATE_OUT + n.removeprefix(STATE_IN) for n in self.states)]
        self._dtypes = {n: _DTYPES[self._declared[n].type] for n in self._declared}
        self._table = StateTable(
            LoadedFile(Path(real)), {n: (self._dtypes[n], self._declared[n].shape) for n in self.states}
        )

    @property
    def path(self) -> Path:
        """Where the file is, links followed."""
        return self._table.file.path

    @property
    def is_stateful(self) -> bool:
        """Whether the file takes states, so that a sequence can come in chunks."""
        return bool(self.states)

    @property
    def has_rows(self) -> bool:
        """Whether the rows of a batch are streams of their own, which may start and stop whenever they like."""
        return self._table.has_rows and self.metadata.get(ROWS) != TOGETHER

    def shape(self, name: str) -> tuple[int | str, ...]:
        """Of an input or output, as the file declares it: sizes that aren't fixed by name. Raises DataError."""
        return tuple(self._known({**self._given, **self._declared}, name).shape)

    def dtype(self, name: str) -> type[np.generic]:
        """Of an input or a state. Raises DataError."""
        found: type[np.generic] = self._known(self._dtypes, name)
        return found

    def steps_dim(self, name: str) -> int:
        """Which dimension of an input or output is time, in a file whose outputs are late."""
        steps = self._declared[self._seen].shape[1] if self._seen else "time"
        shape = self.shape(name)
        return shape.index(steps) if steps in shape else 1

    def _known(self, table: Mapping[str, Any], name: str) -> Any:
        if name not in table:
            raise DataError(f"the file has no {name!r}; it has: {', '.join(table)}.")
        return table[name]

    def zero_state(self, batch: int) -> State:
        """The states that start `batch` sequences, in the shapes that the file declares. Raises DataError."""
        if not is_whole(batch) or batch < 1:
            raise DataError(f"batch: expected a whole number of at least 1, found {batch!r}.")
        return self._table.zeros(int(batch))

    def run(self, inputs: Arrays, state: Mapping[str, np.ndarray] | None = None) -> tuple[Arrays, State]:
        """(outputs, state after them); no state means a sequence's start. The state goes into the next call as it is.

        Of a file whose outputs are late every step holds a token, unless its input `seen` says otherwise. Raises
        DataError for inputs that the file doesn't take or that don't fit it, a chunk without a step among them, and
        StateError for a state of another file or batch.
        """
        if not isinstance(inputs, Mapping):
            raise DataError(
                f"inputs: expected arrays by name, {{{self.inputs[0]!r}: ...}}, found a {type(inputs).__name__}."
            )
        if self._seen and self._seen not in inputs:
            first = next((n for n in self.inputs if n in inputs and n not in self.held), None)
            if first is not None and (found := np.shape(inputs[first])) and len(found) > self.steps_dim(first):
                inputs = {**inputs, self._seen: np.ones((found[0], found[self.steps_dim(first)]), np.bool_)}
        given = {}
        for name in self.inputs:
            if name not in inputs:
                raise DataError(f"missing input {name!r}; the file takes: {', '.join(self.inputs)}.")
            given[name] = value = exactly(name, inputs[name], self._dtypes[name])
            if not value.size:
                raise DataError(f"{name}: expected at least one row and one step, found the shape {value.shape}.")
            self.check_ids(name, value)
            if self._bounds:
                self._check_bounds(name, value)
        if len(inputs) > len(given):
            raise DataError(self._not_taken(next(n for n in inputs if n not in given)))
        rows = None
        if self.states:
            rows = next(len(v) if v.ndim else 1 for v in given.values())
            if other := next((n for n in self.held if given[n].shape[:1] != (rows,)), None):
                raise DataError(
                    f"{other}: expected a source of {rows} rows, as {self.inputs[0]} has, found the shape "
                    f"{given[other].shape}. Encode as many."
                )
        if len(given) > 1:
            self._check_sizes(given)
        if rows is not None:
            given |= self._table.zeros(rows) if state is None else self._table.check(state, rows)
        try:
            values = self._session.run(self._names, given, self._giving_back if state is None else None)
        except Exception as error:
            self._check_sizes(given)
            raise DataError(f"onnxruntime refuses these inputs: {first_line(error)}") from error
        count = len(self.outputs)
        after = State(zip(self.states, values[count:], strict=True), self._table.file, rows)
        return dict(zip(self.outputs, values[:count], strict=True)), after

    def check_ids(self, name: str, value: np.ndarray) -> None:
        """Raises DataError for numbers that no table of the file holds, where one is read by them."""
        if name in self._tables and not (value.min() >= 0 and value.max() < self._tables[name]):
            worst = value.min() if value.min() < 0 else value.max()
            raise DataError(f"{name} holds {worst}; expected ids from 0 to {self._tables[name] - 1}.")

    def _not_taken(self, name: object) -> str:
        taken = f"the file takes: {', '.join(self.inputs)}"
        if name in self.states:
            return f"{name} is a state, and no input: give it as state=, with the others; {taken}."
        return f"the file doesn't take {name!r}, so that it would be ignored; {taken}."

    def _check_sizes(self, given: Arrays) -> None:
        """Raises DataError for inputs that are not of the declared shapes, or not as long as each other."""
        sizes: dict[str, tuple[str, int]] = {}
        for name in self.inputs:
            shape, found = self._declared[name].shape, given[name].shape
            told = f"{name}: expected the shape ({', '.join(map(str, shape))}), found {found}"
            if len(shape) != len(found) or any(
                isinstance(d, int) and d != n for d, n in zip(shape, found, strict=True)
            ):
                raise DataError(f"{told}.")
            for dim, size in zip(shape, found, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, (name, size))[1] != size:
                    first, other = sizes[dim]
                    raise DataError(f"{told}: {dim!r} is {other} in {first}.")

    def _check_bounds(self, name: str, value: np.ndarray) -> None:
        for dim, size in zip(self._declared[name].shape, value.shape, strict=False):
            bound = self._bounds.get(dim)
            if bound is not None and not bound.holds(size):
                raise DataError(
                    f"{name}: expected {bound.describe()} for {dim!r}, found {size}: the network that the file was "
                    "made of computes otherwise there."
                )

    def flush(self, inputs: Arrays, state: Mapping[str, np.ndarray]) -> tuple[Arrays, State]:
        """The last `delay` outputs of sequences that have ended, after a run that left `state`; `inputs` are any that
        the file takes, such as those of that run: their last step is repeated, and read as no token. Raises DataError
        for a file whose outputs aren't late.
        """
        if not self.delay:
            raise DataError("the file's outputs are not late: there is nothing to flush.")
        timed = [n for n in self.inputs if n != self._seen and n not in self.held]
        last = {n: last_step(inputs[n], self.steps_dim(n)).repeat(self.delay, self.steps_dim(n)) for n in timed}
        held = {n: inputs[n] for n in self.held}
        return self.run({**last, **held, self._seen: np.zeros((len(last[timed[0]]), self.delay), np.bool_)}, state)

    def check_state(self, state: Mapping[str, np.ndarray], batch: int | None = None) -> None:
        """Raises StateError for a state of another file, or of another number of rows than that."""
        self._table.check(state, batch)

    def save_state(self, path: str | Path, state: Mapping[str, np.ndarray]) -> Path:
        """Write a state as safetensors. Raises StateError for one of another file, WriteError."""
        return self._table.save(path, state)

    def load_state(self, path: str | Path) -> State:
        """What `save_state` wrote. Raises StateError for a state of another file, and for what is none."""
        return self._table.load(path)

    def take_rows(self, state: Mapping[str, np.ndarray], rows: Sequence[int]) -> State:
        """The state of some rows of a batch, in this order. Raises StateError."""
        self._tell_rows_apart()
        return self._table.take(self._table.check(state), rows)

    def join_rows(self, states: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """The state of one batch with the rows of all, in order, wherever each is. Raises StateError."""
        self._tell_rows_apart()
        return self._table.join([self._table.check(state) for state in states])

    def _tell_rows_apart(self) -> None:
        if not self.has_rows:
            raise StateError("the rows of a batch count their steps together in this file: no row is apart from them.")
