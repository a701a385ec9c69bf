"""YAML of plain values alone: text that takes as long to read as it is long, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LONGEST = 4 * 2**20  # characters: a plan of several thousand parts
DEEPEST = 32  # a plan is 4 deep
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):  # a few of them, nested, stand for gigabytes
            raise yaml.composer.ComposerError(None, None, "expected values written out, found an alias", mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"expected at most {DEEPEST} levels, found more", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag not in _TAGS:
            raise yaml.composer.ComposerError(None, None, f"expected a plain value, found {node.tag}", mark)
        return node


def read(text: str) -> Any:
    """Mappings, lists, text, numbers, booleans and null. Raises yaml.YAMLError for all else: aliases, other tags,
    values that aren't of their tag, what is nested or long beyond any plan.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"expected at most {LONGEST} characters, found more")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # such as !!int "x"
        raise yaml.YAMLError(f"a value can't be read: {type(error).__name__}: {error}") from error


def text_of(path: str | Path) -> str:
    """A file's text, as far as `read` could take it. Raises OSError, UnicodeDecodeError."""
    with Path(path).open(encoding="utf-8") as file:
        return file.read(LONGEST + 1)
