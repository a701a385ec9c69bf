"""Texts of what a run is of: others where it changed, and the same in another process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from thesean.fact_texts import made_with, text_of, text_of_values


def weighed(output: Any, batch: Any, by: float = 1.0) -> Any:
    return by * output


class Weighed:
    def __init__(self, by: float) -> None:
        self.by, self._calls = by, 0

    def __call__(self, output: Any, batch: Any) -> Any:
        self._calls += 1
        return self.by * output

    def method(self, output: Any, batch: Any) -> Any:
        return self.by * output


class Smoothed(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(label_smoothing=by)


def closing(by: Any) -> Callable[..., Any]:
    def loss(output: Any, batch: Any) -> Any:
        return by * output

    return loss


def defaulting(by: float) -> Callable[..., Any]:
    def loss(output: Any, batch: Any, by: float = by) -> Any:
        return by * output

    return loss


MADE: dict[str, Callable[[float], Any]] = {
    "partial": lambda by: partial(weighed, by=by),
    "closure": closing,
    "tensor": lambda by: closing(torch.tensor([by])),
    "default": defaulting,
    "object": Weighed,
    "method": lambda by: Weighed(by).method,
    "module": Smoothed,
    "a function's": lambda by: closing(closing(by)),
    "one line": lambda by: (lambda output, batch: 1.0, lambda output, batch: 2.0)[int(by) - 1],
}


@pytest.mark.parametrize("how", MADE)
def test_what_a_function_is_made_with_is_told_apart(how):
    make = MADE[how]
    assert made_with(make(1.0)) == made_with(make(1.0)) != made_with(make(2.0))


def test_what_changes_while_a_loss_is_called_is_no_setting_of_it():
    history: list[float] = []
    writing, counting = closing(history), Weighed(1.0)
    before = made_with(writing), made_with(counting)
    history.append(1.0)
    counting(1.0, None)
    assert (made_with(writing), made_with(counting)) == before


def test_a_function_that_was_typed_in_is_known_by_what_it_does():
    typed: dict[str, Any] = {"__name__": "typed_in"}
    found = []
    for body in ("output + batch", "output - batch"):
        exec(f"def loss(output, batch): return {body}", typed)
        found.append(text_of(typed["loss"]))
    assert found[0] != found[1]
    assert "0x" not in found[0]  # it would lie elsewhere in another process


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (np.array([1, 2]), np.array([1, 3])),
        ([1, 2], [1, 3]),
        ({"text": "a"}, {"text": "b"}),
        ((torch.ones(2), 1), (torch.ones(2), 2)),
    ],
)
def test_rows_are_told_apart_by_all_that_they_hold(one, other):
    assert text_of_values(one) == text_of_values(one) != text_of_values(other)
