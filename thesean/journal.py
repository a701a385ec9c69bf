"""A run that can be continued: its finished pieces lie on disk, and the one under way at a recent step.

A run is a nest of named pieces that always come in the same order. Run again with the same journal, a piece that was
finished isn't computed: what it touches is put into the state that it left. The innermost piece that was under way goes
on from its last checkpoint. Together with the random state and the place in the data, which belong to every piece, the
run ends with the same bits as one that was never interrupted.

    FOLDER/../steps.jsonl        every step that was taken: see report/lines.py
    FOLDER/run.json              what the run is of: another guide, recipe, plan, target code or data is another run
    FOLDER/lock                  who is at work there
    FOLDER/align.safetensors     a piece; those inside of it go when it is whole
    FOLDER/tune.3@120.safetensors    a piece under way, the last two checkpoints of it
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from thesean import ranks
from thesean.at_work import LOCK, occupy
from thesean.errors import ResumeError, TheseanError, WriteError
from thesean.scratch import named, telling
from thesean.warn import warn
from thesean.write_file import new_file, write_text

Resume = Literal["auto", "never", "must"]
RESUMES: tuple[Resume, ...] = ("auto", "never", "must")

_FORMAT = 1
_KEPT = 2  # checkpoints of the piece under way

# A checkpoint is written when its cost is no more than this share of the time since the one before.
_SHARE, _AT_LEAST_S = 0.03, 0.5

_UNDER_WAY = re.compile(r"(?P<piece>.+)@(?P<step>\d+)\.safetensors")

Value = TypeVar("Value")


class Stateful(Protocol):
    """What a piece changes: nested dicts, lists and tuples of tensors, numbers, texts and None, out and in again."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has: the message says how it goes on."""


class Journal:
    """Without a folder it keeps nothing, and computes everything. Of several ranks the first one writes and reads, and
    tells the others.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self.always: tuple[Stateful, ...] = ()
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext  # in which states are read and written
        self.told: list[str] = []  # where it went on, for the report
        self.stopping = 0  # the signal that asked for it
        self.running = False  # whether steps are taken, after one of which it can stop
        self._names: list[str] = []
        self._written, self._cost = clock(), 0.0
        self._failed, self._began = False, False
        self._leave: Callable[[], None] = lambda: None

    def open(self, facts: Callable[[], Mapping[str, str]], resume: Resume) -> None:
        """`facts` say what the run is of. Raises ResumeError where it `must` be continued and can't be, and where
        another process is at it; WriteError.
        """
        if self.folder is None:
            if resume == "must":
                raise ResumeError("there is no run to continue: resume='must' needs the workdir= that it was begun in.")
            return
        ranks.first(lambda: self._open(dict(facts()), resume))

    def _open(self, found: dict[str, str], resume: Resume) -> None:
        assert self.folder is not None
        with telling(self.folder.parent, "workdir="):
            self._began = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._leave = occupy(self.folder)
        why = self._another(found) if resume != "never" else "it was to begin anew"
        if why is None:
            return
        if resume == "must":
            raise ResumeError(f"{self.folder}: there is no run to continue: {why}.")
        if resume == "auto" and any(self.folder.glob("*.safetensors")):
            warn([f"{self.folder}: begun anew: {why}."])
        self.clear()
        text = json.dumps({"format": _FORMAT, "facts": found}, indent=2) + "\n"
        write_text(self.folder / "run.json", text)

    @property
    def log(self) -> Path | None:
        """Where the steps of the run are told, one a line."""
        return None if self.folder is None else self.folder.parent / "steps.jsonl"

    def clear(self) -> None:
        """Remove what was kept."""
        if self.folder is not None and self.folder.is_dir():
            with telling(self.folder):
                for path in (self.folder / "run.json", *self.folder.glob("*.safetensors")):
                    path.unlink(missing_ok=True)
                if self.log is not None:
                    self.log.unlink(missing_ok=True)

    @property
    def going_on(self) -> str:
        """What to tell whoever stopped the run."""
        if self.folder is None or not any(self.folder.glob("*.safetensors")):
            return "Nothing was kept: the same call begins anew."
        return "The same call goes on from what was kept."

    def abandon(self) -> None:
        """Remove the folder that this run made, where it failed before there was anything to keep."""
        if self.folder is None or not self._began or any(self.folder.glob("*.safetensors")):
            return
        with suppress(OSError):
            for name in ("run.json", LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def close(self) -> None:
        """Others may be at work in the folder from now on."""
        self._leave()

    def piece(self, name: str, compute: Callable[[], Value], *parts: Stateful) -> Value:
        """What `compute` returns (numbers, texts, lists, dicts), or returned when it was computed; `parts` are left as
        it left them.
        """
        if self.folder is None:
            return compute()
        self._names.append(name)
        try:
            full, folder = ".".join(self._names), self.folder
            found = ranks.first(lambda: self._read(folder / f"{full}.safetensors"))
            if found is not None:
                self._load(found["parts"], parts)
                value: Value = found["value"]
                return value
            value = compute()
            if ranks.is_first():
                self._write(f"{full}.safetensors", {"value": value, "parts": self._state(parts)})
                for path in self._within(full):
                    path.unlink(missing_ok=True)
            return value
        finally:
            self.running = False
            self._names.pop()

    def resumed(self, *parts: Stateful) -> int:
        """The step at which the piece under way goes on, with `parts` as they were then; 0 where it begins."""
        self._written = self._clock()
        if self.folder is None or not self._names:
            return 0
        self.running = True
        step, found = ranks.first(self._latest)
        if step:
            with self.around():
                self._load(found["parts"], parts)
            self.told.append(f"went on at step {step} of {' '.join(self._names)}")
        return step

    def _latest(self) -> tuple[int, Any]:
        """The last checkpoint that can be read, and its step; 0 where there is none."""
        for step, path in self._checkpoints():
            found = self._read(path)
            if found is not None:
                return step, found
        return 0, None

    def after_step(self, step: int, *parts: Stateful) -> None:
        """Write a checkpoint if it is time for one, or if the run is to stop. Raises Interrupted then."""
        if ranks.any_of(bool(self.stopping)):
            kept = self._checkpoint(step, parts)
            raise Interrupted(
                f"stopped after step {step}. " + ("The same call goes on from there." if kept else "Nothing was kept.")
            )
        if self.folder is None or not self._names:
            return
        since = self._clock() - self._written
        (due,) = ranks.agreed(float(since >= max(_AT_LEAST_S, self._cost / _SHARE)))
        if due:
            self._checkpoint(step, parts)

    def _checkpoint(self, step: int, parts: tuple[Stateful, ...]) -> bool:
        if self.folder is None or not self._names:
            return False
        begun = self._clock()
        with self.around():
            state = self._state(parts)  # which ranks may have to put together
            kept = not ranks.is_first() or self._write(f"{'.'.join(self._names)}@{step}.safetensors", {"parts": state})
        if kept and ranks.is_first():
            for _, path in self._checkpoints()[_KEPT:]:
                path.unlink(missing_ok=True)
        self._written = self._clock()
        self._cost = self._written - begun
        return kept

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Of the piece under way, the last one first."""
        assert self.folder is not None
        full = ".".join(self._names)
        found = [(int(m["step"]), path) for path in self.folder.iterdir() if (m := _UNDER_WAY.fullmatch(path.name))]
        return sorted(((step, path) for step, path in found if path.name == f"{full}@{step}.safetensors"), reverse=True)

    def _within(self, full: str) -> list[Path]:
        """What was kept of a piece and its own pieces while it was under way."""
        assert self.folder is not None
        return [p for p in self.folder.glob("*.safetensors") if p.name.startswith((f"{full}.", f"{full}@"))
                and p.name != f"{full}.safetensors"]  # fmt: skip

    def _state(self, parts: tuple[Stateful, ...]) -> list[Any]:
        return [part.state_dict() for part in (*parts, *self.always)]

    def _load(self, states: list[Any], parts: tuple[Stateful, ...]) -> None:
        for part, state in zip((*parts, *self.always), states, strict=True):
            part.load_state_dict(state)

    def _write(self, name: str, what: Any) -> bool:
        """Whether it could be: a full disk is told once, and the run goes on."""
        assert self.folder is not None
        packed = _Packed()
        text = json.dumps(packed.pack(what))
        try:
            with new_file(self.folder / name, parents=True) as path, telling(path):
                save_file(packed.tensors, path, metadata={"state": text})
            return True
        except (WriteError, SafetensorError) as error:
            if not self._failed:
                warn([f"no checkpoint was kept: {error}"])
            self._failed = True
            return False

    def _read(self, path: Path) -> Any:
        """None for what isn't there, or is torn, which is told."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return _unpack(json.loads(file.metadata()["state"]), tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warn([f"{path} can't be read ({error}); an earlier state serves"])
            return None

    def _another(self, facts: Mapping[str, str]) -> str | None:
        """Why what the folder holds is another run, or none."""
        assert self.folder is not None
        path = self.folder / "run.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                return f"{path.name} is of another version of Thesean"
            earlier = dict(found["facts"])
        except FileNotFoundError:
            return "nothing was begun there"
        except (OSError, ValueError, KeyError, TypeError):
            return f"{path.name} can't be read"
        changed = [name for name, value in facts.items() if earlier.get(name) != value]
        return f"what it is of has changed: {', '.join(changed)}" if changed else None


def journal_in(folder: Any) -> Journal:
    """Of a run's folder; None keeps nothing."""
    return Journal(None if folder is None else named(folder) / "checkpoints")


KEEPS_NOTHING = Journal()


@contextmanager
def stoppable(journal: Journal) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the step end, keep a checkpoint, and stop; a second one stops at once.

    Only where something is kept, and in the main thread, which alone is told of signals. A run that was refused before
    there was anything to keep leaves nothing.
    """
    if journal.folder is None or threading.current_thread() is not threading.main_thread():
        with _abandoned_if_refused(journal):
            yield
        return

    def stop(number: int, frame: Any) -> None:
        if journal.stopping:
            raise KeyboardInterrupt
        journal.stopping = number
        if not journal.running:  # no step that could end
            raise Interrupted(f"stopped between steps. {journal.going_on}")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        with _abandoned_if_refused(journal):
            yield
    except Interrupted as told:
        if ranks.is_first():
            print(told, file=sys.stderr)
        if journal.stopping == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        for number in signals:
            signal.signal(number, before[number])


@contextmanager
def _abandoned_if_refused(journal: Journal) -> Iterator[None]:
    try:
        yield
    except TheseanError:
        journal.abandon()
        raise
    finally:
        journal.close()


class _Packed:
    """Nested values as JSON, with tensors set apart; a tensor that stands in two places is one."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._held: list[torch.Tensor] = []  # or another could come to lie where one was

    def pack(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
            if value.numel() == 0 or key not in self._names:
                name = f"t{len(self.tensors)}"
                self._held.append(value)
                self._names[key] = name
                # views of one storage are refused; a copy of what isn't the whole of its own is made anyway
                whole = value.detach()
                alone = whole.is_contiguous() and whole.untyped_storage().nbytes() == whole.nbytes
                self.tensors[name] = whole if alone else whole.clone(memory_format=torch.contiguous_format)
            return {"tensor": self._names[key]}
        if isinstance(value, Mapping):
            return {"dict": [[self.pack(k), self.pack(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [self.pack(v) for v in value]}
        if isinstance(value, list):
            return [self.pack(v) for v in value]
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return {"float": value.hex()}
        raise TypeError(f"a {type(value).__name__} has no place in a checkpoint")


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in inner}
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in inner)
    if kind == "float":
        return float.fromhex(inner)
    raise ValueError(f"{kind!r} is nothing that a checkpoint holds")
