"""Further arguments of a public function, whose names a TypedDict says: a misspelt one is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from thesean.errors import unknown_name


def check_keywords(function: Callable[..., Any], named: type, given: Mapping[str, Any]) -> None:
    """`named`: the TypedDict of what the function takes by **. Raises UnknownNameError for any other name."""
    for name in given:
        if name not in named.__annotations__:
            own = [p.name for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
            known = {*own, *named.__annotations__} - {"self"}
            raise unknown_name(f"argument of {function.__name__}", name, known)
