"""Fewer layers of the same kind: of a merged part one member stays, with its weights, and the others are dropped."""

from __future__ import annotations

from typing import Any

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options
from thesean.targets.shared.module import TargetModule


class CopyOptions(Options):
    """Which member stays is in the plan (`keeps`): the one that the outputs miss most."""


def refuse(part: PartFacts, options: Any) -> TargetModule:
    """There is no module to build: the member that stays is the guide's own."""
    raise part.mismatch(
        "copy",
        found="a part of one member",
        expected="a merged part",
        advice="Merge parts: merge=2, or target_parts= a smaller number.",
    )


TARGET = Family(
    name="copy",
    summary="fewer layers of the same kind: one member of each merged part stays, with its weights",
    options=CopyOptions,
    module=TargetModule,  # nothing is ever saved under this name
    build=refuse,
    scope="members",
)
