"""Targets: the architectures that a part can become, one file per family."""

from thesean.targets.base import Affine, AttentionFacts, Family, PartFacts, Target, TargetModule
from thesean.targets.registry import build_module, get_family, rebuild, register, resolve, targets

__all__ = [
    "Affine",
    "AttentionFacts",
    "Family",
    "PartFacts",
    "Target",
    "TargetModule",
    "build_module",
    "get_family",
    "rebuild",
    "register",
    "resolve",
    "targets",
]
