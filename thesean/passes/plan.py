"""A plan: which parts of the guide become what, readable, editable and independent of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from thesean.errors import PlanError
from thesean.passes.partition import Granularity, matches, no_match
from thesean.targets import Target, resolve
from thesean.targets.base import Scope

KEEP = "keep"

_EDITED = "edited: what the new targets cost is counted when the plan is compiled"


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """One row of a plan. FLOPs are those of one forward at the plan's `sizes`; latencies those of the part alone at
    the first of the plan's `latencies`, None where nothing was measured. `new_` figures have what stays of the part.
    """

    path: str
    target: str  # a family's name, a custom target's name, or "keep"
    options: dict[str, Any] = field(default_factory=dict)
    scope: Scope | None = None
    members: tuple[str, ...] = ()  # the guide's parts that were merged to this one
    keeps: str | None = None  # the member that stays where the others are dropped
    replaces: tuple[str, ...] = ()  # module paths of the regions that are cut out
    operators: str = ""  # what it computes, such as "attention + mlp"
    mixing: str = "none"
    input_shape: tuple[int | str, ...] = ()
    output_shape: tuple[int | str, ...] = ()
    drops: tuple[str, ...] = ()  # side inputs that the replacement does not read, such as a padding mask
    params: int = 0
    flops: int = 0
    new_params: int = 0
    new_flops: int = 0
    freed_params: int = 0  # of what goes with a dropped part, such as the norm before a branch
    latency_ms: float | None = None
    new_latency_ms: float | None = None

    @property
    def kept(self) -> bool:
        return self.target == KEEP


LatencyKind = Literal["prefill", "token", "forward"]


@dataclass(frozen=True, kw_only=True)
class PlanLatency:
    """Medians of onnxruntime on one thread, before anything is trained; None for what can't run there.

    `ceiling_ms` is the guide without the parts that the plan replaces: no replacement of them can be faster. "token"
    is one more token after `context` of them: the guide reads all of them again, `cache_floor_ms` is its time for one
    token without a past, which no key-value cache can beat, and the ceiling has no past either. "forward" is for
    networks without a time dimension, whose context is None.
    """

    context: int | None
    batch: int
    kind: LatencyKind
    guide_ms: float | None
    plan_ms: float | None
    ceiling_ms: float | None
    cache_floor_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProbedCandidate:
    """What target "auto" found out of one candidate of one part.

    `divergence` of the guide with this part alone replaced: nats for logits, else the normalised MSE. `added_ms` to
    the whole network's latency, by the additive model; None where latency was no constraint.
    """

    path: str
    target: str
    divergence: float
    added_ms: float | None
    params: int
    flops: int
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parts in order, and the settings that they were found with. `print(plan)` shows a table."""

    parts: tuple[PlannedPart, ...]
    granularity: str = "block"
    part_globs: tuple[str, ...] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    params: int = 0
    flops: int = 0
    new_params: int = 0
    new_flops: int = 0
    latencies: tuple[PlanLatency, ...] = ()
    notes: tuple[str, ...] = ()
    candidates: tuple[ProbedCandidate, ...] = ()  # of target "auto"
    builders: dict[str, Target] = field(default_factory=dict, compare=False, repr=False)  # targets that are functions

    def __iter__(self) -> Iterator[PlannedPart]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __str__(self) -> str:
        from thesean.passes.plan_table import render

        return render(self)

    @property
    def replaced(self) -> tuple[PlannedPart, ...]:
        return tuple(p for p in self.parts if not p.kept)

    def target_of(self, path: str) -> Target | None:
        """The target of a part, or None where it is kept. Raises UnknownNameError for an edited-in unknown one."""
        part = next(p for p in self.parts if p.path == path)
        if part.kept:
            return None
        if part.target in self.builders:
            return self.builders[part.target]
        return resolve(Target(part.target, scope=part.scope, **part.options))

    def edit(self, glob: str, target: str | Target) -> Plan:
        """A copy in which the parts that `glob` matches become `target` ("keep" to leave them to the guide).

        Figures of a new target are made by `compile`; until then the part counts as it is in the guide. Latencies and
        notes, which are about the plan as it was, are dropped. Raises PlanError without a match.
        """
        if not any(matches(p.path, glob) for p in self.parts):
            raise PlanError(f"edit: {no_match(glob, [p.path for p in self.parts])}")
        chosen = None if target == KEEP else resolve(target)
        fields: dict[str, Any] = {
            "target": KEEP,
            "options": {},
            "scope": None,
            "keeps": None,
            "replaces": (),
            "drops": (),
            "new_params": 0,
            "new_flops": 0,
            "freed_params": 0,
            "new_latency_ms": None,
        }
        builders = dict(self.builders)
        if chosen is not None:
            fields |= {"target": chosen.name, "options": dict(chosen.options), "scope": chosen.scope}
            if chosen.build is not None:
                builders[chosen.name] = chosen
        edited = [p for p in self.parts if matches(p.path, glob)]
        parts = tuple(replace(p, **fields) if p in edited else p for p in self.parts)
        undone = [p for p in edited if not p.kept]
        return replace(
            self,
            parts=parts,
            builders=builders,
            latencies=(),
            candidates=(),
            notes=(_EDITED,) if chosen is not None else (),
            new_params=self.new_params - sum(p.new_params - p.params - p.freed_params for p in undone),
            new_flops=self.new_flops - sum(p.new_flops - p.flops for p in undone),
        )

    def draw(self, path: str | Path) -> Path:
        """A picture, guide above and target below, as .svg or, with matplotlib, .png. Raises PlanError for another
        format, MissingExtraError.
        """
        from thesean.passes.plan_drawing import draw

        return draw(self, Path(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """YAML text, written to `path` if given. Edit `target`, `options` and `scope`; the rest is information.

        Raises PlanError for a path that can't be written.
        """
        data = {k: v for k, v in asdict(replace(self, builders={})).items() if k != "builders"}
        data["part_globs"] = list(self.part_globs) if self.part_globs is not None else None
        data["parts"] = [{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in data["parts"]]
        data["notes"] = list(self.notes)
        data |= {k: list(data[k]) for k in ("latencies", "candidates")}
        try:
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise PlanError(f"an option of a target can't be written as YAML: {error}. Use plain numbers.") from error
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise PlanError(f"can't write the plan {path}: {error.strerror or error}.") from error
        return text

    @staticmethod
    def from_yaml(source: str | Path) -> Plan:
        """From a file's path or YAML text. Raises PlanError that names the wrong field."""
        is_text = isinstance(source, str) and "\n" in source
        try:
            text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
            data = _PlanModel.model_validate(yaml.safe_load(text))
        except OSError as error:
            raise PlanError(f"can't read the plan {source}: {error.strerror or error}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PlanError(f"the plan is not YAML: {str(error).splitlines()[0]}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if not where:
                raise PlanError("the plan is YAML, but not a mapping with parts. Write one with to_yaml.") from error
            raise PlanError(f"plan field {where}: {first['msg']}.") from error
        fields: dict[str, Any] = data.model_dump()
        rows: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in fields.pop("parts")
        ]
        globs = fields.pop("part_globs")
        parts = tuple(PlannedPart(**row) for row in rows)
        fields["notes"] = tuple(fields["notes"])
        fields["latencies"] = tuple(PlanLatency(**row) for row in fields["latencies"])
        fields["candidates"] = tuple(ProbedCandidate(**row) for row in fields["candidates"])
        return Plan(parts=parts, part_globs=tuple(globs) if globs is not None else None, **fields)


class _PartModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: str
    target: str
    options: dict[str, Any] = {}
    scope: Scope | None = None
    members: list[str] = []
    keeps: str | None = None
    replaces: list[str] = []
    operators: str = ""
    mixing: str = "none"
    input_shape: list[int | str] = []
    output_shape: list[int | str] = []
    drops: list[str] = []
    params: int = 0
    flops: int = 0
    new_params: int = 0
    new_flops: int = 0
    freed_params: int = 0
    latency_ms: float | None = None
    new_latency_ms: float | None = None


class _LatencyModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    context: int | None = None
    batch: int = 1
    kind: LatencyKind
    guide_ms: float | None = None
    plan_ms: float | None = None
    ceiling_ms: float | None = None
    cache_floor_ms: float | None = None


class _CandidateModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: str
    target: str
    divergence: float
    added_ms: float | None = None
    params: int = 0
    flops: int = 0
    chosen: bool = False


class _PlanModel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    parts: list[_PartModel]
    granularity: Granularity = "block"
    part_globs: list[str] | None = None
    sizes: dict[str, int] = {}
    params: int = 0
    flops: int = 0
    new_params: int = 0
    new_flops: int = 0
    latencies: list[_LatencyModel] = []
    notes: list[str] = []
    candidates: list[_CandidateModel] = []
