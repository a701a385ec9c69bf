"""What a quantised file is held to: the caller's own samples, or inputs made of the example at all sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import captured, models
from thesean.deploy.parity import IN_TORCH, Check
from thesean.deploy.quantizing.quantized import HELD_OUT, UNRELATED, held_to
from thesean.errors import ExportError
from thesean.samples import samples_of

GIVEN = samples_of(models.token_batches(4), captured.gpt2().signature)
MADE = samples_of(None, captured.gpt2().signature)
PATH = Path("m.onnx")


def at(error: float, label: str = "onnxruntime vs torch") -> Check:
    return Check(label, (2, 7), error)


def test_whose_samples_they_are_is_known():
    assert GIVEN.are_given
    assert not MADE.are_given


def test_on_the_callers_own_samples_it_is_held_to_the_tolerance_and_elsewhere_told():
    near, far = at(0.4), at(0.9)
    checks, notes = held_to(0.5, [at(0.3, HELD_OUT)], [near, far], GIVEN, PATH)
    assert checks == [at(0.3, HELD_OUT), near]
    (note,) = notes
    assert note.startswith(
        "on inputs made of the example largest error 9.0e-01 (onnxruntime vs torch at (2, 7)), above"
    )
    assert note.endswith("the tolerance for the last batch of data")
    assert held_to(0.5, [at(0.3, HELD_OUT)], [near], GIVEN, PATH)[1] == []


@pytest.mark.parametrize(
    ("samples", "on_samples", "at_sizes", "told"),
    [
        (GIVEN, 0.6, 0.1, "quantised vs exact at .*at most 5e-01 .*found 6.0e-01"),
        (GIVEN, 0.1, UNRELATED * 1.1, "onnxruntime vs torch at .*at most 2e[+]00 .*found 2.2e[+]00"),
        (MADE, 0.6, 0.1, "quantised vs exact at .*at most 5e-01 .*give data= to be judged on"),
        (MADE, 0.1, 0.6, "onnxruntime vs torch at .*at most 5e-01 .*give data= to be judged on"),
    ],
)
def test_what_is_too_far_off_is_refused(samples: Any, on_samples: float, at_sizes: float, told: str):
    with pytest.raises(ExportError, match=told):
        held_to(0.5, [at(on_samples, HELD_OUT)], [at(at_sizes)], samples, PATH)


def test_a_tolerance_that_is_larger_holds_everywhere():
    checks, notes = held_to(3.0, [at(2.5, HELD_OUT)], [at(2.9)], GIVEN, PATH)
    assert (len(checks), notes) == (2, [])


def test_what_torch_computes_in_chunks_has_no_part_in_a_file():
    checks, _ = held_to(0.5, [], [at(0.1), at(0.7, IN_TORCH)], MADE, PATH)
    assert checks == [at(0.1)]
