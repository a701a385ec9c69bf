"""Memory that was freed, back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """glibc keeps freed blocks of up to 32 MiB, and what comes after doesn't fit into their holes: outputs of a large
    vocabulary, made and freed a few times, come to a quarter of a guide. Nothing happens with another C library.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another system
        return None
