"""Targets: the architectures that a part can become, one file per family."""

from __future__ import annotations

import sys
from types import ModuleType

from thesean.targets.shared.facts import Affine, AttentionFacts, BlockFacts, MLPFacts, NormFacts, PartFacts
from thesean.targets.shared.family import Family, Options, Target
from thesean.targets.shared.module import State, TargetModule
from thesean.targets.shared.registry import build_module, decided, get_family, rebuild, register, resolve, targets

__all__ = [
    "Affine",
    "AttentionFacts",
    "BlockFacts",
    "Family",
    "MLPFacts",
    "NormFacts",
    "Options",
    "PartFacts",
    "State",
    "Target",
    "TargetModule",
    "build_module",
    "decided",
    "get_family",
    "rebuild",
    "register",
    "resolve",
    "targets",
]


# `thesean.targets` is this subpackage and, for users, the function that lists the families: the module can be called.
class _CallableModule(ModuleType):
    def __call__(self) -> dict[str, str]:
        return targets()


sys.modules[__name__].__class__ = _CallableModule
