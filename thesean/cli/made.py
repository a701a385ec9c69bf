"""The networks that `thesean bench` sets side by side: read from a folder, or converted now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import thesean
from thesean.choose.choose import UNMET
from thesean.choose.solve import require_solver
from thesean.cli.words import ArgumentError, load_guide
from thesean.converted import Converted
from thesean.distill.hold_out import hold_out
from thesean.errors import PlanError
from thesean.targets import Target
from thesean.trade_offs import Network
from thesean.warn import warn


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model is converted to: words of --target, and budgets of target "auto"."""

    targets: Sequence[str] | None
    speedups: tuple[float, ...]
    at: int | None
    candidates: Sequence[str | Target]

    def __post_init__(self) -> None:
        if not self.speedups and (self.at or self.candidates):
            raise ArgumentError("--at and --candidate belong to --speedup, which is not given.")
        if wrong := [s for s in self.speedups if not s > 1]:
            raise ArgumentError(f"--speedup {wrong[0]:g}: expected a number above 1, so many times the guide's speed.")


@dataclass(frozen=True, kw_only=True)
class Made:
    """`conversions`: what was made for this, to be kept."""

    networks: Network | Mapping[str, Network]
    held_out: Iterable[Any] | None
    guide: nn.Module | None = None
    conversions: Mapping[str, Converted] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_saved(folder: str, guide: str | None, told: Mapping[str, Any]) -> Made:
    """Raises ArgumentError without the guide."""
    if guide is None:
        raise ArgumentError(
            f"{folder} holds neither its guide nor a frontier of hybrids, and one point is no trade-off: give --guide "
            "too, or the model in place of the folder, which is then converted."
        )
    return Made(networks=folder, guide=load_guide(guide), held_out=told.get("eval_data", told.get("data")))


def converted_now(word: str, asked: Asked, planning: Mapping[str, Any], run: dict[str, Any]) -> Made:
    """`planning` as `thesean.plan` takes it, `run` what it and `compile` share. Raises PlanError where no budget can be
    met, and what they raise.
    """
    if asked.speedups:
        require_solver()
    model = load_guide(word)
    notes: list[str] = []
    held_out = run.get("eval_data")
    if held_out is None and run.get("data") is not None:
        divided = hold_out(run["data"], run["seed"])
        held_out = divided.held_out if divided.held_out is not None else run["data"]
        run |= {"data": divided.data, "eval_data": held_out}
        notes.append(divided.told)
    made: dict[str, Converted] = {}
    plans = _planned(model, asked, planning, run, notes)
    if asked.targets or not asked.speedups:
        made[_name(planning["target"])] = thesean.compile(model, **{**planning, **run})
    first = next(iter(made.values()), None)
    networks: dict[str, Network] = {name: converted.frontier for name, converted in made.items()}
    for name, plan in plans.items():
        networks[name] = made[name] = thesean.compile(model, plan=plan, **run)
    alone = first is not None and len(made) == 1
    return Made(
        networks=first if alone and first is not None else networks,
        held_out=held_out,
        conversions=made,
        notes=tuple(notes),
    )


def _planned(
    model: nn.Module, asked: Asked, planning: Mapping[str, Any], run: Mapping[str, Any], notes: list[str]
) -> dict[str, thesean.Plan]:
    """The plans that meet their budgets, before anything is converted; a note of each that doesn't."""
    if not asked.speedups:
        return {}
    place = {} if asked.at is None else {"context": asked.at}
    shared = {k: v for k, v in run.items() if k not in ("metric", "budget")}
    division = {k: planning[k] for k in ("parts", "keep", "granularity")}
    budgets = [{"speedup": s, **place} for s in asked.speedups]
    plans = thesean.plan(
        model, "auto", constraints=budgets, candidates=asked.candidates or None, **division, **shared
    )  # fmt: skip
    found = {}
    for speedup, plan in zip(asked.speedups, plans, strict=True):
        unmet = next((note for note in plan.notes if note.startswith(UNMET)), None)
        if unmet is not None or not plan.replaced:
            why = (unmet or "the guide itself meets it").removeprefix("warning: ")
            notes.append(f"--speedup {speedup:g} is left out: {why}")
            continue
        found[f"auto {speedup:g}x"] = plan
    if not found:
        raise PlanError("; ".join(note for note in notes if note.startswith("--speedup")) + ". Give other budgets.")
    warn(note for note in notes if note.startswith("--speedup"))
    return found


def _name(target: Any) -> str:
    if isinstance(target, Mapping):
        return ", ".join(dict.fromkeys(map(_name, target.values())))
    return target.name if isinstance(target, Target) else str(target)
