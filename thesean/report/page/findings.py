"""What a page tells beside plan and report: what was measured when it was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thesean.report.answers import Answers
from thesean.report.points import Points


@dataclass(frozen=True, kw_only=True)
class Lost:
    """An example on which guide and converted disagree. `shown` is a text, or an image as rows of grey levels in
    [0, 1]; `guide` and `converted` say what each gave there.
    """

    number: int
    distance: float
    shown: str | Sequence[Sequence[float]]
    guide: str
    converted: str
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Alike:
    """CKA of each part's exit in the guide with each in the converted network; NaN where one doesn't vary."""

    parts: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    rows: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What an exported file takes: (name, dtype of numpy, shape) of inputs and of states, and its outputs' names;
    `masks` are those of the inputs that hide all where they are zeros.
    """

    file: str
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    states: tuple[tuple[str, str, tuple[int | str, ...]], ...] | None  # None: no file is at hand
    outputs: tuple[str, ...] = ()
    masks: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """`why` says what is missing, and why, by section: "lost", "alike"."""

    why: dict[str, str]
    served: Served
    lost: tuple[Lost, ...] = ()
    unit: str = ""  # of their distances
    looked_at: int = 0
    alike: Alike | None = None
    trade_offs: Points | None = None
    answers: Answers | None = None
