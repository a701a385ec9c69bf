"""Families by name: every file in this folder that defines `TARGET`, and those that users register or install."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from thesean.errors import ArtifactError, TargetMismatchError, TheseanError, first_line, unknown_name
from thesean.installed import load_installed
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options, Place, Target, parse_options
from thesean.targets.shared.module import TargetModule

_families: dict[str, Family] = {}
_discovered = False


def register(family: Family) -> Family:
    """Make a family known by its name. Raises TargetMismatchError when another one has that name."""
    if not isinstance(family, Family):
        raise TargetMismatchError(
            f"register: expected a Family, found {getattr(family, '__name__', type(family).__name__)}. Give "
            "Family(name=..., summary=..., options=..., module=..., build=...)."
        )
    _discover()
    return _add(family)


def targets() -> dict[str, str]:
    """Every family's name and its one-line summary, sorted by name."""
    _discover()
    return {name: _families[name].summary for name in sorted(_families)}


def get_family(name: str) -> Family:
    """Raises UnknownNameError, with the nearest known name."""
    _discover()
    if name not in _families:
        raise unknown_name("target", name, _families)
    return _families[name]


def resolve(target: str | Target) -> Target:
    """A name or a Target -> a Target whose name and options are known to be good.

    Raises UnknownNameError for an unknown name, TargetMismatchError for a wrong option or another type.
    """
    if isinstance(target, str):
        target = Target(target)
    if not isinstance(target, Target):
        raise TargetMismatchError(f"expected a target's name or a Target, found {type(target).__name__}.")
    family = get_family(target.name) if target.build is None else None
    if target.scope not in (None, "mixing", "token-wise", "part") and (family is None or target.scope != family.scope):
        raise TargetMismatchError(
            f"target {target.name!r}: expected scope='mixing', 'token-wise' or 'part', found {target.scope!r}."
        )
    if family is not None:
        parse_options(family, target.options)
    return target


def build_module(target: Target, part: PartFacts) -> nn.Module:
    """The module that replaces the part, freshly initialised: `copy_from` is the caller's to call.

    A recurrent family that is asked for a whole block, `Target(..., scope="part")`, becomes a residual block with a
    LayerNorm, unless its options say otherwise. Raises TargetMismatchError with part, found, expected, next step.
    """
    if target.build is not None:
        with _told(target.name, part, "build(part)"):
            module = target.build(part)
        if not isinstance(module, nn.Module):
            raise part.mismatch(
                target.name,
                found=type(module).__name__,
                expected="a builder that returns an nn.Module",
                advice="Return the module from build(part).",
            )
        return module
    family = get_family(target.name)
    options = _options(family, target, part)
    family.check(part, options)
    with _told(family.name, part, "Family.build(part, options)"):
        return family.build(part, options)


def _options(family: Family, target: Target, part: PartFacts) -> Options:
    given = dict(target.options)
    frame = {"residual", "norm"} <= family.options.model_fields.keys()
    if target.scope == "part" and family.scope == "mixing" and frame:
        given = {"residual": not part.is_branch, "norm": True, **given}
    return parse_options(family, given)


def decided(target: Target, places: Sequence[Place]) -> Target:
    """The target with options that it leaves open chosen by what the guide does there, where its family does so."""
    family = get_family(target.name) if target.build is None else None
    if family is None or family.decide is None or not places:
        return target
    chosen = family.decide(places, _options(family, target, places[0].facts))
    return Target(target.name, scope=target.scope, **{**target.options, **chosen}) if chosen else target


@contextmanager
def _told(name: str, part: PartFacts, what: str) -> Iterator[None]:
    """Whatever a stranger's builder raises becomes a TargetMismatchError that names the part and the target."""
    try:
        yield
    except TheseanError:
        raise
    except Exception as error:
        on_meta = torch.get_default_device().type == "meta"
        advice = (
            "A plan builds it on the meta device, where tensors have shapes and no values: read none before `prepare`."
            if on_meta
            else "Let `check` refuse what it can't be built for."
        )
        cause = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        raise TargetMismatchError(f"{part.path}: target {name!r}: {what} raised {cause}. {advice}") from error


def rebuild(family_name: str, config: dict[str, Any]) -> TargetModule:
    """The module of a saved conversion, before its weights are loaded: `config` is what `config()` gave.

    Raises UnknownNameError, and ArtifactError for a configuration that the family doesn't take.
    """
    family = get_family(family_name)
    if getattr(family.module, "family", None) != family.name:
        raise ArtifactError(f"target {family_name!r} picks another family and has no module of its own to load.")
    try:
        return family.module(**config)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"target {family_name!r}: the saved configuration does not fit: {error}") from error


def _add(family: Family) -> Family:
    if _families.setdefault(family.name, family) is not family:
        raise TargetMismatchError(f"target {family.name!r} is already registered. Choose another name.")
    return family


def _discover() -> None:
    # Lazy: importing thesean should not import every target
    global _discovered
    if _discovered:
        return
    package = importlib.import_module("thesean.targets")
    for info in pkgutil.iter_modules(package.__path__):
        family = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "TARGET", None)
        if isinstance(family, Family):
            _add(family)
    _discovered = True  # first: an installed module may call `register` while it is imported
    load_installed("thesean.targets", Family, _add)
