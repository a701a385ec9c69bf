"""One line where `transformers` is missing."""

from __future__ import annotations

import importlib.util

from thesean.errors import MissingExtraError


def require_transformers() -> None:
    """Raises MissingExtraError."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError("transformers", "hf")
