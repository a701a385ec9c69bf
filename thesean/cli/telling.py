"""How the command line speaks: errors and warnings in one line, steps on stderr."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from thesean import ranks
from thesean.errors import TheseanError


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """A TheseanError becomes one red line and exit code 2, ctrl-C one line and 130, a warning one yellow line. Of
    several ranks one tells what happens to all.
    """
    console = Console(stderr=True, highlight=False)

    def say(word: str, style: str, message: str) -> None:
        console.print(f"[{style}]{word}:[/]", end=" ")
        console.print(" ".join(message.split()), markup=False, soft_wrap=True)

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        if ranks.leads():
            say("warning", "yellow", str(message))

    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = show_warning
            yield
    except TheseanError as error:
        if debug:
            raise
        if ranks.tells(error):
            say("error", "bold red", str(error))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if ranks.leads():
            say("interrupted", "bold red", "earlier results are as they were.")
        raise typer.Exit(130) from error


@contextmanager
def steps_told() -> Iterator[None]:
    """What is being measured, a line a step on stderr: it can take minutes."""
    loggers = [logging.getLogger(name) for name in ("thesean.deploy", "thesean.trade_offs")]
    handler, levels = logging.StreamHandler(), [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
