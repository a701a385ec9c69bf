"""What an ONNX file says of itself, read as what it was written as: metadata are text that anybody may alter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter

from thesean.errors import ExportError

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Late:
    """Outputs come `steps` steps late; the input `seen` is True where a token comes in."""

    steps: int = 0
    seen: str = ""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The other file of an encoder-decoder, its SHA-256, and what an encoder's file gives its decoder's."""

    file: str
    sha256: str = ""
    gives: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StateRow:
    """A state's name, and what starts it."""

    name: str
    start: str


def told_as(told: Mapping[str, str], key: str, kind: type[Kind], default: Kind) -> Kind:
    """What the metadata `told` hold under `key`. Raises ExportError where that isn't of its kind."""
    return parsed(told, key, kind) if key in told else default


def parsed(told: Mapping[str, str], key: str, kind: type[Kind]) -> Kind:
    """`told_as` of a key that is there."""
    try:
        return TypeAdapter(kind).validate_python(json.loads(told[key]))
    except (ValueError, RecursionError) as error:  # no JSON, or another kind
        raise ExportError(f"the file's metadata were altered: {key} can't be read. Export it again.") from error
