"""The states of an ONNX file: what starts them, whether some fit, rows taken and joined, and kept on the disk.

B batch, P steps that are remembered
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thesean.deploy.sampling import is_whole
from thesean.errors import DataError, StateError
from thesean.passes.thread_state import PAST, state_shape
from thesean.scratch import file_sha256, named
from thesean.write_file import new_file

Arrays = dict[str, np.ndarray]

# In the metadata of a saved state: of its file, and of its own numbers.
FILE_HASH, OWN_HASH = "thesean.file_sha256", "thesean.state_sha256"


def arrays_of(inputs: Mapping[str, torch.Tensor]) -> Arrays:
    """For files in float32, as all are of which no other precision was asked for: of networks in any."""
    return {n: (v.float() if v.is_floating_point() else v).cpu().numpy() for n, v in inputs.items()}


class LoadedFile:
    """A model as it was when it was loaded, known by its SHA-256; the weights beside it are in its own metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._then = self._now()

    @cached_property
    def hash(self) -> str:
        """Read when it is first asked for. Raises StateError where the file isn't the one that was loaded any more."""
        if self._now() != self._then or self._then is None:
            raise StateError(f"{self.path} was replaced or removed since it was loaded. Load it again.")
        return file_sha256(self.path)

    def _now(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


class State(Arrays):
    """A dict of arrays by the names of a file's states, that knows of which file they are; `rows` of which batch, where
    they are as the file gave them.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
        file: LoadedFile,
        rows: int | None = None,
    ) -> None:
        super().__init__(arrays)
        self.file = file
        self._rows, self._given = rows, tuple(self.values())

    def is_as_given(self, file: LoadedFile, rows: int | None) -> bool:
        """Whether no array was exchanged since: those of each step needn't be looked at again."""
        if self.file is not file or self._rows is None or (rows is not None and rows != self._rows):
            return False
        return len(self) == len(self._given) and all(map(is_, self.values(), self._given))


class StateTable:
    """Which states a file declares: `declared` has the dtype and the shape of each, sizes that aren't fixed by name."""

    def __init__(self, file: LoadedFile, declared: Mapping[str, tuple[type[np.generic], Sequence[int | str]]]) -> None:
        self.file = file
        self.dtypes = {name: np.dtype(dtype) for name, (dtype, _) in declared.items()}
        self.shapes = {name: tuple(shape) for name, (_, shape) in declared.items()}
        # of each state that remembers steps: in which dimension, and as many as which others
        self.past = {
            name: (dim, size)
            for name, shape in self.shapes.items()
            for dim, size in enumerate(shape)
            if isinstance(size, str) and size.startswith(PAST)
        }
        # which of the steps held a token
        self.tokens = {
            size: [n for n, (dim, s) in self.past.items() if s == size and dim == 1 and self.dtypes[n] == np.bool_]
            for _, size in self.past.values()
        }
        self._known: dict[int, dict[str, tuple[int, ...]]] = {}

    @property
    def has_rows(self) -> bool:
        """Whether each row's state is apart from the others', and a shorter past can be told from a longer one."""
        return all(isinstance(s[0], str) for s in self.shapes.values()) and all(self.tokens.values())

    def zeros(self, batch: int) -> State:
        """What starts `batch` sequences; nothing is remembered."""
        sizes = {name: state_shape(shape, batch, 0) for name, shape in self.shapes.items()}
        return State({name: np.zeros(size, self.dtypes[name]) for name, size in sizes.items()}, self.file, batch)

    def check(self, state: Mapping[str, Any], batch: int | None = None) -> Mapping[str, np.ndarray]:
        """The state, if it is one of this file and of so many rows. Raises StateError."""
        if isinstance(state, State) and state.is_as_given(self.file, batch):
            return state
        if not isinstance(state, Mapping):
            raise StateError(f"expected a state, arrays by name as `run` gives them, found a {type(state).__name__}.")
        if isinstance(state, State) and state.file is not self.file and state.file.hash != self.file.hash:
            raise StateError(f"the state is of another file, {state.file.path}; this one is {self.file.path}.")
        if state.keys() != self.shapes.keys():
            known, found = (", ".join(sorted(names)) or "none" for names in (self.shapes, state))
            raise StateError(f"the state is of another file: expected {known}, found {found}.")
        if batch is None:
            by_row = [state[n] for n, shape in self.shapes.items() if isinstance(shape[0], str) and np.ndim(state[n])]
            batch = len(by_row[0]) if by_row else 1
        if batch not in self._known:
            fixed = {n: tuple(state_shape(s, batch, 0)) for n, s in self.shapes.items() if n not in self.past}
            self._known = {batch: fixed}
        lengths: dict[str, int] = {}
        for name, value in state.items():
            if not isinstance(value, np.ndarray) or value.dtype != self.dtypes[name]:
                raise StateError(f"{name}: expected an array of {self.dtypes[name]}, found {_kind(value)}.")
            expected = self._known[batch].get(name)
            if expected is None:
                dim, size = self.past[name]
                length = lengths.setdefault(size, value.shape[dim] if value.ndim > dim else 0)
                expected = tuple(state_shape(self.shapes[name], batch, length))
            if value.shape != expected:
                raise StateError(self._misfit(name, value.shape, batch))
        return state

    def _misfit(self, name: str, found: tuple[int, ...], batch: int) -> str:
        shape = self.shapes[name]
        fixed = [f == s for f, s in zip(found, shape, strict=False) if isinstance(s, int)]
        alike = len(found) == len(shape) and all(fixed)
        if alike and isinstance(shape[0], str) and found[0] != batch:
            return f"{name}: the state is of {found[0]} rows, expected {batch}."
        told = ", ".join(str(batch) if d == 0 and isinstance(s, str) else str(s) for d, s in enumerate(shape))
        return f"{name}: the state is of another file or batch: expected ({told}), found {found}."

    def take(self, state: Mapping[str, np.ndarray], rows: Sequence[int]) -> State:
        """Some rows, without steps that none of them remembers. Raises StateError for rows that there are not."""
        count = next((len(value) for value in state.values()), 0)
        if not isinstance(rows, Iterable) or not all(_is_row(row, count) for row in rows):
            raise StateError(f"rows: expected whole numbers from 0 to {count - 1}, found {rows!r}.")
        return self._trimmed({name: value[list(rows)] for name, value in state.items()})

    def _trimmed(self, state: Arrays) -> State:
        for size, names in self.tokens.items():
            held_P = np.any([state[name].any(0) for name in names], 0)
            first = int(held_P.argmax()) if held_P.any() else len(held_P)
            for name, (dim, its) in self.past.items():
                if first and its == size:
                    state[name] = np.ascontiguousarray(state[name][(slice(None),) * dim + (slice(first, None),)])
        return State(state, self.file)

    def join(self, states: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """The rows of all, in order. Those with a shorter past get steps in front that hold no token. Raises StateError
        where there are none.
        """
        if not states:
            raise StateError("expected the states of one row or more to join, found none.")
        if len(states) == 1:
            return states[0]
        joined = {}
        for name in self.shapes:
            values = [state[name] for state in states]
            if name in self.past:
                dim = self.past[name][0]
                longest = max(value.shape[dim] for value in values)
                values = [_filled(value, dim, longest) for value in values]
            joined[name] = np.concatenate(values)
        return State(joined, self.file)

    def save(self, path: Any, state: Mapping[str, np.ndarray]) -> Path:
        """As safetensors, with the SHA-256 of the file that it is of. Raises StateError, WriteError."""
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(value) for name, value in self.check(state).items()}
        path = named(path)
        with new_file(path, parents=True) as made:
            made.write_bytes(save(arrays, {FILE_HASH: self.file.hash, OWN_HASH: _hash(arrays)}))
        return path

    def load(self, path: Any) -> State:
        """Raises StateError for one of another file, for one that was changed, and for what is none."""
        from safetensors import safe_open

        path = named(path, "read", DataError)
        try:
            with safe_open(path, "numpy") as content:
                told = content.metadata() or {}
                arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except OSError as error:
            raise StateError(f"can't read {path}: {error.strerror or error}.") from error
        except Exception as error:  # safetensors' own
            raise StateError(f"{path} is no saved state.") from error
        if FILE_HASH not in told:
            raise StateError(f"{path} is no saved state: it doesn't tell of which file.")
        if told[FILE_HASH] != self.file.hash:
            raise StateError(f"{path} is a state of another file than {self.file.path}.")
        if told.get(OWN_HASH, found := _hash(arrays)) != found:  # those of earlier versions have none
            raise StateError(f"{path} was changed since it was saved.")
        return State(self.check(arrays), self.file)


def _hash(arrays: Arrays) -> str:
    found = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).data)
    return found.hexdigest()


def _filled(value: np.ndarray, dim: int, length: int) -> np.ndarray:
    """Zeros in front."""
    missing = length - value.shape[dim]
    return np.pad(value, [(missing if d == dim else 0, 0) for d in range(value.ndim)]) if missing else value


def _is_row(row: Any, count: int) -> bool:
    return is_whole(row) and bool(0 <= row < count)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
