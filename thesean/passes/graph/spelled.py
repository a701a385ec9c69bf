"""Module names in the source that torch.fx writes of a graph: any that Python allows as an attribute's.

torch 2.13 writes `self.by.class`, and `getattr(self.by, "a"b")`: code for identifiers and for text without quotes.
"""

from __future__ import annotations

import keyword
import unicodedata

import torch.fx.graph
from torch import fx


def read_as_written(name: str) -> bool:
    """Whether Python reads this identifier as itself: it keeps some for itself, and reads others as their plain twins,
    "ſelf" as "self".
    """
    return not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name


def spell(base: str, path: str) -> str:
    """Source that reads the attribute at `path` of what `base` is, each name as the very text that it is."""
    for name in path.split("."):
        plain = name.isidentifier() and read_as_written(name)
        base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base


# torch offers no place for this, and writes source wherever a graph module is made, copied or read: in torch.export too
torch.fx.graph._format_target = spell  # type: ignore[assignment]


def is_spelled() -> bool:
    """Whether torch writes names as `spell` does, also those that would end the quotes around them: whoever reads names
    that others wrote asks first.
    """
    name, graph = 'a"b\\', fx.Graph()
    graph.output(graph.create_node("get_attr", name))
    return spell("self", name) in graph.python_code("self").src
