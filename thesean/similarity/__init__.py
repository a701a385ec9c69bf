"""Similarity of activations: one file per measure, each tensors -> scalar."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from thesean.similarity.shared.accumulate import accumulate
from thesean.similarity.shared.measure import EvaluationOnlyError, Measure
from thesean.similarity.shared.registry import MeasureError, get_measure, measures, register, similarity

__all__ = [
    "EvaluationOnlyError",
    "Measure",
    "MeasureError",
    "accumulate",
    "get_measure",
    "measures",
    "register",
    "similarity",
]


# `thesean.similarity` is this subpackage and, for users, a function: importing the one binds the name of the other.
# So that `thesean.similarity(x, y)` works whichever came last, the module itself can be called.
class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return similarity(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
