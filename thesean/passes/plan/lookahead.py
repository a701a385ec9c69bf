"""How far ahead the outputs of a whole network read, where parts that read both ways were given a look-ahead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx


def steps_in_a_row(nodes: Iterable[fx.Node], ends: Mapping[fx.Node, tuple[fx.Node, int]]) -> int:
    """The most steps that replaced parts look ahead one after the other. `ends`: exit -> (entry, steps) of each."""
    ahead: dict[fx.Node, int] = {}
    for node in nodes:
        if node in ends:
            entry, steps = ends[node]
            ahead[node] = ahead.get(entry, 0) + steps
        else:
            ahead[node] = max((ahead.get(i, 0) for i in node.all_input_nodes), default=0)
    return max(ahead.values(), default=0)
