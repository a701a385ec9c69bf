"""What other packages bring: entry points in the groups `thesean.targets` and `thesean.measures`.

[project.entry-points."thesean.targets"]
mine = "my_package.mine:TARGET"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from thesean.errors import TheseanError


def load_installed(group: str, expected: type, add: Callable[[Any], Any]) -> None:
    """Hand every installed object of the group to `add`.

    One that can't be loaded, or that `add` refuses, is left out with a UserWarning that names its distribution:
    somebody else's package should not stand in the way of a conversion that doesn't use it.
    """
    noun = group.removeprefix("thesean.").removesuffix("s")
    for entry in entry_points(group=group):
        try:
            found = entry.load()
            if not isinstance(found, expected):
                raise TypeError(f"expected a {expected.__name__}, found {type(found).__name__}.")
            add(found)
        except Exception as error:  # whatever a stranger's import raises
            problem = str(error) if isinstance(error, TheseanError) else f"{type(error).__name__}: {error}"
            owner = entry.dist.name if entry.dist is not None else "an unknown distribution"
            warnings.warn(
                f"{owner}: the {noun} {entry.name!r} ({entry.value}) is left out: {problem} "
                f"Update or uninstall {owner}.",
                UserWarning,
                stacklevel=2,
            )
