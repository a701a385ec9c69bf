"""What the guide makes of batches that come again, kept: a step need not run it then.

A batch is known by its bytes. Whether batches come again is known of a list; of anything else it shows in the second
pass, so that a stream that never repeats holds nothing, and where that pass is known to have ended without any its
batches are no longer looked at: on a GPU that waits for what is under way. What doesn't fit is computed each time:
nothing is let go of for something newer, for in a cycle that is always what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from thesean.distill.stream import hash_of
from thesean.units import quantity

Run = Callable[..., Any]
# of a batch's key and of names of nodes: their values, None where one is missing
Saved = Callable[[str, Sequence[str]], dict[str, Any] | None]

ROOM = 2**30  # bytes


class GuideCache:
    """Values of the guide's nodes by batch. `repeats`: all batches come again; else `length` is how many a pass has,
    where that is known. `saved` has those of an earlier run. A guide that draws random numbers is no guide: its capture
    is refused.
    """

    def __init__(self, repeats: bool, saved: Saved | None = None, room: int = ROOM, length: int | None = None) -> None:
        self.repeats, self.saved, self.room, self.length = repeats, saved, room, length
        self.runs = self.spared = 0
        self._values: dict[str, dict[str, Any]] = {}
        self._bytes = 0
        self._met: set[str] = set()

    @property
    def told(self) -> str:
        """What it saved, "" where that is nothing."""
        if not self.spared:
            return ""
        held = f"{quantity(self._bytes, 'B')} of its activations kept" if self._bytes else "its activations were saved"
        return f"the guide was not run in {self.spared} of {self.runs + self.spared} steps: {held}"

    def runner(self, run: Run, names: Sequence[str]) -> Run:
        """Calls `run`, which gives values by these names, where they aren't known."""

        def known_or_run(**inputs: torch.Tensor) -> Any:
            if self.in_vain:
                return run(**inputs)
            key = key_of(inputs)
            found = self._known(key, names)
            if found is not None:
                self.spared += 1
                return found
            made = run(**inputs)
            self.runs += 1
            if self.repeats or key in self._met:
                self._keep(key, made)
            self._met.add(key)
            return made

        return known_or_run

    @property
    def in_vain(self) -> bool:
        """Whether two passes went by, and no batch came again."""
        return not (self.repeats or self.spared or self.length is None) and self.runs > 2 * self.length

    def _known(self, key: str, names: Sequence[str]) -> dict[str, Any] | None:
        held = self._values.get(key, {})
        if all(name in held for name in names):
            return {name: held[name] for name in names}
        return None if self.saved is None else self.saved(key, names)

    def _keep(self, key: str, made: dict[str, Any]) -> None:
        held = self._values.get(key, {})
        new = {name: value for name, value in made.items() if name not in held}
        leaves = [leaf for leaf in pytree.tree_leaves(new) if isinstance(leaf, torch.Tensor)]
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        if self._bytes + size <= self.room:
            self._bytes += size
            self._values[key] = {**held, **new}


def key_of(inputs: Mapping[str, torch.Tensor]) -> str:
    """Of a batch, and of what it is computed in."""
    found = hash_of(inputs[name] for name in sorted(inputs))
    device = next((value.device.type for value in inputs.values()), "cpu")
    return f"{found}-{torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else found
