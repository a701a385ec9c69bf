from __future__ import annotations

import gc
import io
import sys

import pytest
from rich.console import Console

from thesean.report import NullObserver, PlainObserver, RichObserver, make_observer

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def terminal() -> tuple[RichObserver, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140, _environ={"TERM": "xterm"})
    return RichObserver(console), stream


def test_no_progress_is_silent() -> None:
    assert isinstance(make_observer(False), NullObserver)


def test_without_a_terminal_the_lines_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_observer(True), PlainObserver)


def test_plain_speaks_at_begin_and_end_and_every_ten_seconds_between() -> None:
    stream, clock = io.StringIO(), Clock()
    observer = PlainObserver(stream, clock=clock)
    observer.begin("align", "h.1", 2, 5, 100)
    for step in range(1, 101):
        clock.now = step * 0.25
        observer.step(step, {"loss": 1 / step})
    observer.end({"cka": 0.98123})
    observer.close()
    assert stream.getvalue().splitlines() == [
        "stage 2/5 align h.1: 100 steps",
        "stage 2/5 align h.1: step 40/100 loss 0.025, 15 s left",
        "stage 2/5 align h.1: step 80/100 loss 0.0125, 5.0 s left",
        "stage 2/5 align h.1: done in 25 s cka 0.9812",
    ]


def test_plain_closed_form_stages_have_no_steps_and_no_part() -> None:
    stream = io.StringIO()
    observer = PlainObserver(stream, clock=Clock())
    observer.begin("refit", None, 1, 1, 0)
    observer.end({})
    assert stream.getvalue().splitlines() == ["stage 1/1 refit", "stage 1/1 refit: done in 0.0 s"]


def test_the_bar_shows_stage_part_step_and_measure() -> None:
    observer, stream = terminal()
    observer.begin("align", "h[1]", 2, 5, 100)
    observer.step(40, {"loss": 0.25})
    observer._progress.refresh()
    observer.end({"cka": 0.98})
    observer.close()
    text = stream.getvalue()
    for piece in ("stage 2/5 align h[1]", "40/100", "loss 0.25", "left", "cka 0.98"):
        assert piece in text
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_an_interrupt_that_skips_end_and_close_gives_the_cursor_back() -> None:
    observer, stream = terminal()
    try:
        observer.begin("align", "h.1", 1, 2, 10)
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        del observer
    gc.collect()
    text = stream.getvalue()
    assert HIDE in text
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_a_bar_that_was_closed_can_begin_again() -> None:
    observer, stream = terminal()
    observer.begin("align", None, 1, 1, 1)
    observer.close()
    observer.close()
    observer.begin("tune", None, 1, 1, 0)
    observer.step(1, {})
    observer.end({})
    observer.close()
    assert "tune" in stream.getvalue()
