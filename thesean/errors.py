"""Errors that say which part, what was found, what was expected and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# What an installer is asked for. The import and the command are `thesean`, but on the package index that name is
# another project's, with a `thesean` command of its own.
DISTRIBUTION = "thesean-compiler"


class TheseanError(Exception):
    """The base of every error that Thesean raises on purpose."""


class CaptureError(TheseanError):
    """The guide could not be traced to a graph; the message names the place in the user's code."""


class PlanError(TheseanError, ValueError):
    """The plan can't be made or doesn't fit this guide (a glob without a match, an edited plan that's stale)."""


class UnknownNameError(TheseanError, KeyError):
    """A target, measure or recipe that isn't registered."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class TargetMismatchError(TheseanError, ValueError):
    """A target that does not fit the part that it should replace."""


class PassRefused(TheseanError):
    """A pass whose precondition does not hold for this graph."""


class PassBroken(TheseanError, AssertionError):
    """A pass that did not do what it promises: a defect of the pass, not of the graph."""


class DataError(TheseanError, ValueError):
    """Batches that are empty, don't fit the model, or sit on another device or dtype."""


class StateError(DataError):
    """A state of another file, of another batch, or a file that holds none."""


class NumericalError(TheseanError, ArithmeticError):
    """NaN or infinity in activations or in a loss."""


class LostError(TheseanError):
    """A conversion worse than nothing: a uniform guess, or leaving its parts out, is nearer to the guide. The message
    names the part that did it; `converted`, where there is one, is what it came to.
    """

    converted: Any = None


class ExportError(TheseanError):
    """The ONNX file could not be made, or disagrees with the torch module; no file is left behind."""


class ArtifactError(TheseanError):
    """A saved conversion that is incomplete, altered or holds an operator outside the allow-list."""


class NativeError(TheseanError):
    """A conversion that is no network of its guide's class, whatever its configuration; the message says which part."""


class WriteError(ArtifactError, OSError):
    """A file or folder that can't be written; the message names path and reason. What stood there stays."""


class ResumeError(TheseanError):
    """A run that can't be continued: nothing was begun, or it was of another guide, recipe, plan, code or data."""


class RankError(TheseanError):
    """Another process of a run on several is gone, doesn't answer, or was given something else to convert."""


class MissingExtraError(TheseanError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install '{DISTRIBUTION}[{extra}]'")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """`unknown target 'rn'; did you mean 'rnn'? known: conv, gru, rnn`"""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return UnknownNameError(f"unknown {kind} {name!r}{hint} known: {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """What an exception says, without its tail of advice for developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
