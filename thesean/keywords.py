"""Further arguments of a public function, whose names a TypedDict says: a misspelt one is an error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

from thesean.errors import unknown_name


def check_names(kind: str, known: Collection[str], given: Iterable[str]) -> None:
    """Raises UnknownNameError for a name that isn't known."""
    for name in given:
        if name not in known:
            raise unknown_name(kind, name, known)


def check_keywords(function: Callable[..., Any], named: type, given: Mapping[str, Any]) -> None:
    """`named`: the TypedDict of what the function takes by **. Raises UnknownNameError for any other name."""
    own = [p.name for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    known = {*own, *named.__annotations__} - {"self"}  # the function's own never come by **
    check_names(f"argument of {function.__name__}", known, given)
