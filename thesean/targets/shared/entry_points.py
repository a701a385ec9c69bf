"""Families from other packages: entry points in the group `thesean.targets`, `name = "package.module:TARGET"`.

[project.entry-points."thesean.targets"]
mine = "my_package.mine:TARGET"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points

from thesean.errors import TargetMismatchError
from thesean.targets.shared.family import Family

GROUP = "thesean.targets"


def load_families(add: Callable[[Family], Family]) -> None:
    """Hand every installed family to `add`.

    One that can't be loaded, or whose name is taken, is left out with a UserWarning that names its distribution:
    somebody else's package should not stand in the way of a conversion that doesn't use it.
    """
    for entry in entry_points(group=GROUP):
        try:
            family = entry.load()
            if not isinstance(family, Family):
                raise TypeError(f"expected a thesean.targets.Family, found {type(family).__name__}.")
            add(family)
        except Exception as error:  # whatever a stranger's import raises
            problem = str(error) if isinstance(error, TargetMismatchError) else f"{type(error).__name__}: {error}"
            owner = entry.dist.name if entry.dist is not None else "an unknown distribution"
            warnings.warn(
                f"{owner}: the target {entry.name!r} ({entry.value}) is left out: {problem} "
                f"Update or uninstall {owner}.",
                UserWarning,
                stacklevel=2,
            )
