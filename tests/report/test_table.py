from __future__ import annotations

import math

import pytest
from rich.console import Console

from thesean.report import Row, render, verdict

GUIDE = Row(
    name="guide", loss=1.37, params=842_240, onnx_bytes=3_400_000, latency_ms={"token_64": 0.5, "token_2048": 4.0}
)
SCRATCH = Row(name="scratch", loss=1.60, steps=400, seconds=60.0)
DISTILLATION = Row(name="distillation", loss=1.45, steps=400, seconds=75.0)


def converted(loss: float | None, steps: int = 400) -> Row:
    return Row(name="converted", loss=loss, params=850_000, steps=steps, latency_ms={"token_2048": 0.05})


def text_of(rows: list[Row]) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(render(rows))
    return console.export_text()


def test_beating_both_baselines_names_both_gaps_and_the_guides() -> None:
    assert verdict([GUIDE, converted(1.40), SCRATCH, DISTILLATION]) == (
        "Converted beats both baselines: its loss 1.4000 is 0.2000 below scratch's, 0.0500 below distillation's, "
        "all at 400 optimizer steps. That is 0.0300 above the guide's."
    )


def test_losing_to_one_baseline_says_by_how_much() -> None:
    sentence = verdict([converted(1.50), SCRATCH, DISTILLATION])
    assert sentence.startswith("Converted does NOT beat distillation: its loss 1.5000 is")
    assert "0.0500 above distillation's" in sentence
    assert "0.1000 below scratch's" in sentence


def test_a_tie_is_not_a_win() -> None:
    sentence = verdict([converted(1.45), DISTILLATION])
    assert sentence.startswith("Converted does NOT beat distillation")
    assert "equal to distillation's" in sentence


def test_unequal_steps_are_said() -> None:
    sentence = verdict([converted(1.40, steps=500), SCRATCH, DISTILLATION])
    assert "steps are NOT equal (converted 500, scratch 400, distillation 400)" in sentence


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_is_not_finite_wins_nothing(loss: float | None) -> None:
    assert "beats nothing" in verdict([converted(loss), SCRATCH])


def test_a_baseline_that_diverged_is_named_and_not_counted_as_beaten() -> None:
    sentence = verdict([converted(1.4), SCRATCH, Row(name="distillation", loss=math.nan, steps=400)])
    assert sentence.startswith("Converted beats scratch")
    assert "No finite loss from distillation" in sentence


def test_without_baselines_there_is_no_claim() -> None:
    assert verdict([GUIDE, converted(1.0)]).startswith("Nothing to compare")


def test_columns_come_in_the_order_guide_converted_baselines_and_units_are_human() -> None:
    text = text_of([DISTILLATION, SCRATCH, converted(1.4), GUIDE])
    header = next(line for line in text.splitlines() if "guide" in line and "scratch" in line)
    positions = [header.index(name) for name in ("guide", "converted", "scratch", "distillation")]
    assert positions == sorted(positions)
    assert "842 k" in text
    assert "3.4 MB" in text
    latency = next(line for line in text.splitlines() if "token at 2048" in line)
    assert "4 ms" in latency
    assert "50 us" in latency


def test_a_measure_that_nobody_took_leaves_no_line() -> None:
    text = text_of([GUIDE, converted(1.4), SCRATCH])
    assert "FLOPs" not in text
    assert "parameters" in text
