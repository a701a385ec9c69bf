"""Warnings that point at whoever called Thesean, from whatever depth."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from pathlib import Path

from thesean import ranks


def warn(messages: Iterable[str]) -> None:
    if not ranks.is_first():
        return
    home = str(Path(__file__).parent)
    depth = 1
    for frame in inspect.stack(context=0):
        if not frame.filename.startswith(home):
            break
        depth += 1
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=depth)
