"""A misspelt argument of a function that takes some by ** is not left out in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests.models import token_batches
from tests.short_runs import causal, compile_quietly
from thesean.errors import UnknownNameError


def exported(**asked: Any) -> None:
    compile_quietly(causal(), data=token_batches()).export("m.onnx", **asked)


def guide_exported(**asked: Any) -> None:
    thesean.export_guide(nn.Linear(4, 4), "m.onnx", example_inputs=torch.randn(2, 4), **asked)


def traded(**asked: Any) -> None:
    thesean.trade_offs("m", **asked)


@pytest.mark.parametrize(
    ("call", "wrong", "near"),
    [
        (exported, "quantise", "quantize"),
        (guide_exported, "quantise", "quantize"),
        (guide_exported, "state_full", "stateful"),
        (guide_exported, "into", "data"),  # not a caller's
        (guide_exported, "train_length", "data"),
        (guide_exported, "dynamic_axes", "dynamic"),
        (traded, "metrics", "metric"),
        (traded, "length", "lengths"),
    ],
)
def test_a_name_that_is_not_known_is_an_error_that_says_which_are(
    call: Callable[..., None], wrong: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=f"unknown argument of .*{wrong!r}.*{near}"):
        call(**{wrong: None})
    assert not list(tmp_path.iterdir())
