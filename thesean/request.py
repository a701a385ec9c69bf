"""What the user asked for: the arguments of `compile`, `baseline` and `plan`, checked once and handed on whole."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from thesean.choose.constraints import Budgets, Constraints, parse_budgets, parse_constraints
from thesean.distill.callbacks import checked_reader
from thesean.distill.data import Reading, example_inputs_of
from thesean.distill.outputs import OutputKind
from thesean.distill.row_tables import as_batches
from thesean.distill.task import InputsOf, LabelsOf, Loss, Metric
from thesean.errors import DataError, PlanError, unknown_name
from thesean.journal import RESUMES, Resume
from thesean.passes.plan.make_plan import TargetSpec, check_target, keeps_all
from thesean.passes.plan.partition import Granularity
from thesean.passes.plan.plan import Plan
from thesean.recipe import Recipe, RecipeError
from thesean.similarity import get_measure
from thesean.targets import Target

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIME = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>s|min|h)")

# Of a recipe where no part is replaced
_NOTHING_TO_TRAIN = {"steps": 0, "seconds": None, "keep_best": 0, "max_drop": None}

_LARGEST_SEED = 2**48  # seeds are made of it, and torch takes 64 bits


@dataclass(frozen=True, kw_only=True)
class Request:
    """Raises PlanError, UnknownNameError, TargetMismatchError, RecipeError and DataError for what no plan can be made
    of.
    """

    target: TargetSpec = "rnn"
    plan: Plan | str | Path | None = None  # a path is read
    data: Iterable[Any] | None = None
    example_inputs: Any = None
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    loss: Loss | None = None
    metric: Metric | None = None
    eval_data: Iterable[Any] | None = None
    inputs: InputsOf | None = None
    labels: LabelsOf | None = None
    outputs: Mapping[str, OutputKind] | None = None
    parts: Sequence[str] | None = None
    keep: Sequence[str] = ()
    granularity: Granularity | None = None
    merge: int | None = None
    target_parts: int | None = None
    constraints: Constraints | Mapping[str, Any] | Budgets | None = None  # parsed where target is "auto"
    candidates: Sequence[str | Target] | None = None
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None  # resolved
    seed: int = 0
    budget: int | str | None = None  # the recipe's by now
    begun: float = field(default_factory=time.monotonic)
    resume: Resume = "auto"
    cache: str | Path = "auto"  # "off", or a folder of activations
    several: bool = False  # whether one plan a budget may be made
    from_guide: bool = True  # whether what is kept has the guide's weights

    def __post_init__(self) -> None:
        for name, batches in self.sources.items():
            self._resolve(name, as_batches(batches, name))
        self._resolve("recipe", Recipe.resolve(self.recipe))
        if self.budget is not None:
            self._resolve("recipe", self.settings.model_copy(update=spending(self.budget)))
        if isinstance(self.plan, (str, Path)):
            self._resolve("plan", Plan.from_yaml(self.plan))
        self._check_types()
        self._check_objective()
        if self.plan is not None:
            self._check_alone()
        elif self.is_auto:
            self._resolve("constraints", self._budgets())
            if self.settings.keep_best:
                raise RecipeError(
                    f"keep_best: target 'auto' finds out itself which parts stay, found {self.settings.keep_best}. "
                    "Leave it out, or say keep=."
                )
        else:
            check_target(self.target)
            if self.from_guide and keeps_all(self.target):
                self._resolve("recipe", self.settings.model_copy(update=_NOTHING_TO_TRAIN))
            if self.constraints is not None or self.candidates is not None:
                raise PlanError("constraints= and candidates= belong to target='auto', which chooses among candidates.")

    @property
    def is_auto(self) -> bool:
        return self.plan is None and isinstance(self.target, str) and self.target == "auto"

    @property
    def settings(self) -> Recipe:
        assert isinstance(self.recipe, Recipe)  # since __post_init__
        return self.recipe

    @property
    def budgets(self) -> tuple[Constraints, ...]:
        """One, unless a list was given."""
        found = self.constraints
        assert isinstance(found, (Constraints, tuple))  # since __post_init__, with target "auto"
        return (found,) if isinstance(found, Constraints) else found

    @property
    def reading(self) -> Reading:
        """The caller's own words on what is what in a batch."""
        return Reading(checked_reader("inputs", self.inputs), checked_reader("labels", self.labels))

    @property
    def sources(self) -> dict[str, Any]:
        """Where batches come from, by the name of the argument."""
        return {"data": self.data, "eval_data": self.eval_data}

    @property
    def edited(self) -> Plan | None:
        """The plan that was handed in."""
        assert self.plan is None or isinstance(self.plan, Plan)  # since __post_init__
        return self.plan

    @property
    def division(self) -> dict[str, Any]:
        """How the guide is divided into parts, as `divide` takes it."""
        return {
            "keep": self.keep,
            "granularity": self.granularity or ("sublayer" if self.is_auto else None),
            "parts": self.parts,
            "merge": self.merge,
            "target_parts": self.target_parts,
        }

    @property
    def guesses_inputs(self) -> bool:
        """Whether it was left to a batch which inputs the guide has."""
        return self.data is not None and self.example_inputs is None and self.inputs is None

    def example(self, model: nn.Module) -> Any:
        """What the guide is traced with: the example inputs, else the first batch, else its `dummy_inputs`."""
        return example_inputs_of(model, self.data, self.example_inputs, self.reading.inputs)

    def _budgets(self) -> Constraints | Budgets:
        given = self.constraints
        if given is None or isinstance(given, (Constraints, Mapping)):
            return parse_constraints(given)
        if not isinstance(given, (list, tuple)):
            raise PlanError(f"constraints: expected a dict, or a list of them, found {type(given).__name__}.")
        if not self.several:
            raise PlanError(
                "constraints: one network has one budget, found a list. Let thesean.plan find a plan for each, and "
                "convert by plan=."
            )
        return parse_budgets(given)

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        if self.plan is not None and not isinstance(self.plan, Plan):
            raise PlanError(f"plan: expected a Plan or the path of one in YAML, found {type(self.plan).__name__}.")
        for name in ("parts", "keep", "candidates"):
            given = getattr(self, name)
            if given is None or isinstance(given, (str, Target)):
                continue
            kinds = (str, Target) if name == "candidates" else (str,)
            if not isinstance(given, Iterable) or not all(isinstance(v, kinds) for v in given):
                what = "names or Targets" if name == "candidates" else "globs over module paths"
                raise PlanError(f"{name}: expected {what}, found {given!r}.")
        for name in ("loss", "metric", "inputs", "labels"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise DataError(f"{name}: expected a function, found {function!r}.")
        for name in ("outputs", "dynamic"):
            mapping = getattr(self, name)
            if mapping is not None and not isinstance(mapping, Mapping):
                raise DataError(f"{name}: expected a dict by name, found {mapping!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or abs(self.seed) > _LARGEST_SEED:
            raise DataError(f"seed: expected a whole number of at most {_LARGEST_SEED}, found {self.seed!r}.")
        if self.resume not in RESUMES:
            raise unknown_name("way to resume", str(self.resume), RESUMES)
        if not isinstance(self.cache, (str, Path)) or not str(self.cache):
            raise DataError(f'cache: expected "auto", "off" or a folder of activations, found {self.cache!r}.')
        for name in ("merge", "target_parts"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise PlanError(f"{name}: expected a whole number, found {number!r}.")

    def _check_objective(self) -> None:
        """What no recipe can know of itself."""
        for recipe in filter(None, (self.settings, self.settings.retry)):
            for name in recipe.alignment.all_measures:
                if not get_measure(name).differentiable:
                    raise RecipeError(
                        f"alignment.measure: {name!r} has no gradient to train on; it can be reported by "
                        "thesean.similarity."
                    )
            if recipe.alignment.task and self.loss is None:
                raise RecipeError("alignment.task: it is the weight of loss=, and none was given.")

    def _check_alone(self) -> None:
        more = ("parts", "keep", "granularity", "merge", "target_parts", "constraints", "candidates")
        given_twice = [name for name in more if getattr(self, name)] + (["target"] if self.target != "rnn" else [])
        if given_twice:
            raise PlanError(
                f"plan= says what replaces which part: leave {', '.join(given_twice)} out, or edit the plan."
            )


def spending(budget: int | str | None) -> dict[str, Any]:
    """A budget as settings of a recipe: steps, or the seconds of "60s", "10min" and "2h". Raises DataError."""
    if budget is None:
        return {}
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return {"steps": budget, "seconds": None}
    told = _TIME.fullmatch(budget.strip()) if isinstance(budget, str) else None
    seconds = float(told["number"]) * _SECONDS[told["unit"]] if told else 0.0
    if not 0 < seconds < math.inf:
        raise DataError(f'budget: expected a time such as "60s", "10min" or "2h", or steps, found {budget!r}.')
    return {"seconds": seconds}


def sizes_of(name: str, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """One number or several as a tuple. Raises PlanError for anything but whole numbers of 1 or more."""
    if given is None:
        return ()
    numbers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise PlanError(f"{name}: expected whole numbers of 1 or more, such as {name}=128, found {given!r}.")
    return numbers
