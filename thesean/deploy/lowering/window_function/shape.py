"""What a window's function is written for. Its name says all of it.

B batch, T time, S = W + T, W window, N sinks, M = N + W, H heads, G heads of keys and values, R = H / G, C width of
queries and keys, K width of values, k = K + 1, X = C + k, F = 2C features
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAME = re.compile(r"Window_H(\d+)_G(\d+)_C(\d+)_K(\d+)_W(\d+)_N(\d+)(_turned((?:_\d+to\d+)*))?(_biased)?")

# Features whose partners under a rotation are as many runs are cut and joined anew: a Gather by features takes 16
# microseconds for the keys of a window, more than all of its arithmetic.
_MOST_RUNS = 4


class Shape(NamedTuple):
    """What a function is written for; its name says all of it."""

    heads: int
    groups: int
    key: int
    value: int
    window: int
    sinks: int
    turned: bool
    biased: bool
    runs: tuple[tuple[int, int], ...] = ()  # of features that are partners of others, in order; none: any order

    @property
    def name(self) -> str:
        sizes = "_".join(f"{letter}{size}" for letter, size in zip("HGCKWN", self[:6], strict=True))
        turned = "_turned" + "".join(f"_{start}to{end}" for start, end in self.runs) if self.turned else ""
        return f"Window_{sizes}{turned}" + ("_biased" if self.biased else "")

    @classmethod
    def of(cls, name: str) -> Shape | None:
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        heads, groups, key, value, window, sinks = map(int, found.groups()[:6])
        runs = tuple((int(a), int(b)) for a, b in re.findall(r"_(\d+)to(\d+)", found.group(8) or ""))
        return cls(heads, groups, key, value, window, sinks, bool(found.group(7)), bool(found.group(9)), runs)


def runs_of(partner_C: list[int]) -> tuple[tuple[int, int], ...]:
    """Where partners of neighbours are neighbours, (first, past the last)."""
    runs: list[tuple[int, int]] = []
    for feature in partner_C:
        if runs and runs[-1][1] == feature:
            runs[-1] = (runs[-1][0], feature + 1)
        else:
            runs.append((feature, feature + 1))
    return tuple(runs) if len(runs) <= _MOST_RUNS else ()
