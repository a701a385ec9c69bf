"""YAML of plain values alone: text that takes as long to read as it is long, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LONGEST = 4 * 2**20  # characters: a plan of several thousand parts
DEEPEST = 32  # a plan is 4 deep
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # six times as fast, where it was built


def read(text: str) -> Any:
    """Mappings, lists, text, numbers, booleans and null. Raises yaml.YAMLError for all else: aliases, other tags,
    values that aren't of their tag, what is nested or long beyond any plan.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"expected at most {LONGEST} characters, found more")
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):  # a few of them, nested, stand for gigabytes
            raise yaml.YAMLError(f"expected values written out, found an alias{_line(event)}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"expected at most {DEEPEST} levels, found more{_line(event)}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_tags(node)
        return loader.construct_document(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # such as !!int "x"
        raise yaml.YAMLError(f"a value can't be read: {type(error).__name__}: {error}") from error
    finally:
        loader.dispose()


def _line(place: Any) -> str:
    """Of an event or a node that was read: it has a mark."""
    return f" in line {place.start_mark.line + 1}"


def _check_tags(node: yaml.Node) -> None:
    if node.tag not in _TAGS:
        raise yaml.YAMLError(f"expected a plain value, found {node.tag}{_line(node)}")
    if isinstance(node, yaml.CollectionNode):
        for pair in node.value:
            for inner in pair if isinstance(pair, tuple) else (pair,):
                _check_tags(inner)


def text_of(path: str | Path) -> str:
    """A file's text, as far as `read` could take it. Raises OSError, UnicodeDecodeError."""
    with Path(path).open(encoding="utf-8") as file:
        return file.read(LONGEST + 1)
