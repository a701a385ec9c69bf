"""Which token comes next: the likeliest, or one drawn.

V vocabulary, K tokens that are left to draw from
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypedDict

import numpy as np

from thesean.errors import DataError, NumericalError
from thesean.keywords import check_names

_FIRST = 64  # of the likeliest tokens, which mostly suffice
_ROUNDING = 1e-9  # of a sum of probabilities


class SamplingOptions(TypedDict, total=False):
    """What `Sampling` is made of."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits, in this order, which is that of transformers.

    `repetition_penalty` r: logits of what was read or written before are divided by r where positive, multiplied by r
    elsewhere (Keskar et al. 2019, section 4.1). `temperature`: 0 takes the likeliest, which nothing below it changes;
    otherwise logits are divided by it. `top_k`: the k likeliest stay, and what is as likely as the last of them.
    `top_p`: the likeliest stay, until they have that much probability (Holtzman et al. 2020). `min_p`: what has at
    least that share of the likeliest's probability stays (Nguyen et al. 2024). Raises DataError.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        for name, fits, expected in (
            ("temperature", _number(self.temperature) and self.temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k is None or (is_whole(self.top_k) and self.top_k >= 1), "a whole number of at least 1"),
            ("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("min_p", _number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", _number(penalty) and penalty > 0, "a number above 0"),
        ):
            if not fits:
                raise DataError(f"{name}: expected {expected}, found {getattr(self, name)!r}.")
        if not self.temperature and (self.top_k is not None or self.top_p < 1 or self.min_p):
            raise DataError("top_k, top_p and min_p need a temperature: at 0 the likeliest token is taken.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sampling:
        """Raises DataError, and UnknownNameError for an option that there is not."""
        check_names("setting", [field.name for field in fields(cls)], options)
        return cls(**options)

    @cached_property
    def heeds_repetition(self) -> bool:
        return self.repetition_penalty != 1

    def choose(self, logits_V: np.ndarray, read_V: np.ndarray | None, random: np.random.Generator) -> int:
        """A token. `read_V`: True for those that came before, None where nobody asks. Raises NumericalError."""
        if not self.temperature:
            scores_V = logits_V if read_V is None else self._penalised(logits_V, read_V)
            token = int(scores_V.argmax())  # a NaN counts as the largest
            if math.isnan(scores_V[token]):
                raise NumericalError("the file's logits are NaN: no token can be chosen.")
            return token
        token_K, weight_K = self._kept(logits_V, read_V)
        sum_K = weight_K.cumsum()
        return int(token_K[np.searchsorted(sum_K, random.random() * sum_K[-1], side="right")])

    def probabilities(self, logits_V: np.ndarray, read_V: np.ndarray | None = None) -> np.ndarray:
        """How likely `choose` takes each token; float64, (V,)."""
        found_V = np.zeros(len(logits_V))
        if not self.temperature:
            found_V[self._penalised(logits_V, read_V).argmax()] = 1
            return found_V
        token_K, weight_K = self._kept(logits_V, read_V)
        found_V[token_K] = weight_K / weight_K.sum()
        return found_V

    def _penalised(self, logits_V: np.ndarray, read_V: np.ndarray | None) -> np.ndarray:
        if read_V is None or not self.heeds_repetition:
            return logits_V
        scores_V = logits_V.astype(np.float64)
        read = scores_V[read_V]
        scores_V[read_V] = np.where(read > 0, read / self.repetition_penalty, read * self.repetition_penalty)
        return scores_V

    def _kept(self, logits_V: np.ndarray, read_V: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The tokens to draw from, in their order, and how likely each is beside the likeliest."""
        scores_K = self._penalised(logits_V, read_V)
        largest = float(scores_K.max(initial=-math.inf))
        if not math.isfinite(largest):
            raise NumericalError(f"the largest of the file's logits is {largest}: no token can be drawn.")
        if self.top_k is None:
            token_K = np.arange(len(scores_K))
        else:
            token_K = likeliest(scores_K, self.top_k)
            scores_K = scores_K[token_K]
        with np.errstate(over="ignore"):  # next to 0 all but the likeliest are
            weight_K = np.exp((scores_K.astype(np.float64) - largest) / self.temperature)
        if self.top_p < 1:
            kept = nucleus(weight_K / weight_K.sum(), self.top_p)
            token_K, weight_K = token_K[kept], weight_K[kept]
        if self.min_p:  # the likeliest weighs 1, and is always among them
            kept = np.flatnonzero(weight_K >= self.min_p)
            token_K, weight_K = token_K[kept], weight_K[kept]
        return token_K, weight_K


def likeliest(x_V: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest are, and what is as large as the last of them, in the order of the tokens; all where
    there are no more.
    """
    if count >= len(x_V):
        return np.arange(len(x_V))
    token_K, pieces = None, 4 * count
    if len(x_V) > 8 * pieces:  # no larger than the last one of all is the last one of the pieces' largest
        width = len(x_V) // pieces
        bound = np.partition(x_V[: pieces * width].reshape(pieces, width).max(1), -count)[-count]
        token_K = np.flatnonzero(x_V >= bound)
        x_V = x_V[token_K]
    found_K = np.flatnonzero(x_V >= np.partition(x_V, -count)[-count])
    return found_K if token_K is None else token_K[found_K]


def nucleus(probability_V: np.ndarray, top_p: float) -> np.ndarray:
    """The likeliest tokens, until they have that much probability, in the order of the tokens."""
    count = _FIRST
    while True:
        token_K = likeliest(probability_V, count)
        token_K = token_K[np.argsort(-probability_V[token_K], kind="stable")]
        sum_K = probability_V[token_K].cumsum()
        if sum_K[-1] > top_p + _ROUNDING or count >= len(probability_V):
            return np.sort(token_K[sum_K - probability_V[token_K] < top_p])
        count *= 8


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Python's or numpy's, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
