"""What the functions of held tokens are written for. Their names say all of it.

H heads, G heads of keys and values, C width of queries and keys, K width of values, W window, M places before it
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LETTERS = "HGCKWMF"

# What a layer's step is told by `who_stays`: the place that its token takes, the logarithm of how much each place then
# counts, the marks, and where among these the token's own score goes.
CHOSEN = ("slot", "seen", "marks", "own")


class Shape(NamedTuple):
    """Of one layer's function: `fade` 0 where scores don't fall."""

    heads: int
    groups: int
    key: int
    value: int
    window: int
    places: int
    fade: int

    @property
    def name(self) -> str:
        return "Held_" + "_".join(f"{letter}{size}" for letter, size in zip(_LETTERS, self, strict=True))

    @classmethod
    def of(cls, name: str) -> Shape | None:
        found = re.fullmatch("Held_" + "_".join(rf"{letter}(\d+)" for letter in _LETTERS), name)
        return None if found is None else cls(*map(int, found.groups()))

    @property
    def all_places(self) -> int:
        return self.window + self.places

    @property
    def columns(self) -> int:
        """Of a token as a row: its key, its score, its value and a 1."""
        return self.key + self.value + 2

    def who_stays(self, layers: int) -> str:
        """The name of the function that chooses for so many layers at once."""
        sizes = zip("GCKWMFL", (*self[1:], layers), strict=True)
        return "WhoStays_" + "_".join(f"{letter}{size}" for letter, size in sizes)
