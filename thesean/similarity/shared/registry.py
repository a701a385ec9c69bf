"""The measures by name, and `similarity`, which applies one.

N examples, P width of x, Q width of y
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from thesean.errors import TheseanError, unknown_name
from thesean.installed import load_installed
from thesean.similarity.shared.gather import gather_rows
from thesean.similarity.shared.measure import Measure
from thesean.similarity.shared.rows import Flatten, rows

_measures: dict[str, Measure] = {}
_discovered = False


class MeasureError(TheseanError, ValueError):
    """A measure that can't be registered: it is none, or its name is taken."""


def register(measure: Measure) -> Measure:
    """Make a measure known by its name, to recipes too. Raises MeasureError when another one has that name."""
    if not isinstance(measure, Measure):
        raise MeasureError(
            f"register: expected a Measure, found {getattr(measure, '__name__', type(measure).__name__)}. Give "
            "Measure(name=..., summary=..., value=...)."
        )
    _discover()
    return _add(measure)


def measures() -> list[str]:
    """The names that `similarity(..., measure=)` takes, sorted."""
    _discover()
    return sorted(_measures)


def get_measure(name: str) -> Measure:
    """The measure of this name. Raises UnknownNameError, with the nearest name."""
    _discover()
    if name not in _measures:
        raise unknown_name("measure", name, _measures)
    return _measures[name]


def _add(measure: Measure) -> Measure:
    if _measures.setdefault(measure.name, measure) is not measure:
        raise MeasureError(f"measure {measure.name!r} is already registered. Choose another name.")
    return measure


def _discover() -> None:
    """Every `MEASURE` in this folder, the file is the registration, and those that are installed."""
    global _discovered
    if _discovered:
        return
    package = importlib.import_module("thesean.similarity")
    for info in pkgutil.iter_modules(package.__path__):
        measure = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "MEASURE", None)
        if isinstance(measure, Measure):
            _add(measure)
    _discovered = True  # first: an installed module may call `register` while it is imported
    load_installed("thesean.measures", Measure, _add)


def similarity(
    x: torch.Tensor,
    y: torch.Tensor,
    measure: str | Measure = "cka",
    *,
    flatten: Flatten = "example",
    mask: torch.Tensor | None = None,
    gather: bool = False,
    **options: Any,
) -> torch.Tensor:
    """How alike two sets of activations of the same examples are: a differentiable scalar.

    x (N, ...), y (N, ...) -> scalar; `flatten="example"` makes each example one row (N, P), `flatten="token"` each
    position of (..., P) one row. `get_measure(name)` tells whether a measure takes different widths (`same_width`),
    which way it goes (`higher_is_better`), whether it can train (`differentiable`) and which changes of one side it
    does not see (`blind_to`). `options` are the measure's own. Half precision reaches the kernels as it is and is added
    up in float32; the result is in float32, or in float64 where a side is.

        similarity(student_BTD, guide_BTD, "cka-debiased", flatten="token", mask=attention_mask_BT)

    `mask` is True, or 1, where a row counts: (N,), or the leading shape of tokens. With `gather=True` in a process
    group the measure is that of all processes' rows together, the same on each; a process's features get the gradient
    that they have in it. DistributedDataParallel averages gradients: times the world size they are a single process's.

    Raises UnknownNameError for an unknown measure, DataError for too few examples, constant features or shapes that do
    not fit, NumericalError for NaN and infinities, TypeError for an option that the measure does not have.
    """
    chosen = measure if isinstance(measure, Measure) else get_measure(measure)
    check_options(chosen, options)
    x_NP, y_NQ = rows("x", x, flatten, mask), rows("y", y, flatten, mask)
    if gather:
        x_NP, y_NQ = gather_rows(x_NP), gather_rows(y_NQ)
    return chosen.value(x_NP, y_NQ, **options)


def check_options(measure: Measure, options: Mapping[str, Any]) -> None:
    """Raises TypeError for an option that the measure does not have."""
    known = list(inspect.signature(measure.value).parameters)[2:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"measure {measure.name!r} has no option {unknown[0]!r}; its options: {', '.join(known) or 'none'}."
        )
