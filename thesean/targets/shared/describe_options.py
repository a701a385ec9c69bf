"""A family's options in words, for the command line and the docs."""

from __future__ import annotations

import types
import typing
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from thesean.targets.shared.family import Options

_BOUNDS = {
    "gt": "above {}",
    "ge": "at least {}",
    "lt": "below {}",
    "le": "at most {}",
    "min_length": "at least {} of them",
}


class Option(NamedTuple):
    name: str
    type: str
    default: str
    told: str  # its description, and the bounds that it is held to


def describe_options(options: type[Options]) -> list[Option]:
    """In the order in which the class declares them."""
    return [
        Option(
            name, type_name(field.annotation), value_text(field.get_default(call_default_factory=True)), _told(field)
        )
        for name, field in options.model_fields.items()
    ]


def type_name(annotation: Any) -> str:
    """`int | None`, `"gelu" | "relu"`, `tuple[float, float]`: without modules and bounds."""
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(f'"{a}"' for a in arguments)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, arguments))}]"
    return str(annotation.__name__)


def value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _told(field: FieldInfo) -> str:
    bounds = [
        form.format(getattr(bound, key))
        for bound in field.metadata
        for key, form in _BOUNDS.items()
        if hasattr(bound, key)
    ]
    return "; ".join([*([field.description] if field.description else []), *([" and ".join(bounds)] if bounds else [])])
