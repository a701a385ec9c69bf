"""A plan: which parts of the guide become what, readable, editable and independent of the graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thesean import plain_yaml
from thesean.errors import PlanError
from thesean.passes.plan import plan_yaml
from thesean.passes.plan.drawing import draw
from thesean.passes.plan.partition import matches, no_match
from thesean.passes.plan.rows import KEEP, PlanRows
from thesean.passes.plan.table import render
from thesean.scratch import named
from thesean.targets import Target, resolve
from thesean.write_file import write_text

_EDITED = "edited: what the new targets cost is counted when the plan is compiled"


@dataclass(frozen=True, kw_only=True)
class Plan(PlanRows):
    """What `thesean.plan` returns and `compile(plan=...)` takes. `print(plan)` shows a table."""

    builders: dict[str, Target] = field(default_factory=dict, compare=False, repr=False)  # targets that are functions

    def __str__(self) -> str:
        return render(self)

    def target_of(self, path: str) -> Target | None:
        """The target of a part, or None where it is kept. Raises UnknownNameError for an edited-in unknown one,
        PlanError for a part that isn't there.
        """
        part = next((p for p in self.parts if p.path == path), None)
        if part is None:
            raise PlanError(no_match(str(path), [p.path for p in self.parts]))
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
        if not isinstance(glob, str) or not any(matches(p.path, glob) for p in self.parts):
            raise PlanError(f"edit: {no_match(str(glob), [p.path for p in self.parts])}")
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
        format, MissingExtraError, WriteError.
        """
        return draw(self, named(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """YAML text, written to `path` if given. Edit `target`, `options` and `scope`; the rest is information.

        Raises WriteError for a path that can't be written.
        """
        text = plan_yaml.dump(self)
        if path is not None:
            write_text(path, text)
        return text

    @staticmethod
    def from_yaml(source: str | Path) -> Plan:
        """From a file's path or YAML text. Raises PlanError that names the wrong field."""
        is_text = isinstance(source, str) and "\n" in source
        try:
            text = str(source) if is_text else plain_yaml.text_of(named(source, "read", PlanError))
        except OSError as error:
            raise PlanError(f"can't read the plan {source}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"the plan is not YAML: {str(error).splitlines()[0]}.") from error
        return Plan(**vars(plan_yaml.load(text)))
