"""Modules as tests read them: by attribute, whatever the family."""

from __future__ import annotations

from typing import Any, Literal

from thesean.targets import PartFacts, Target, build_module


def build(name: str, part: PartFacts, *, scope: Literal["mixing", "part"] | None = None, **options: Any) -> Any:
    return build_module(Target(name, scope=scope, **options), part)
