"""A plan's rows as YAML and back: the dataclasses themselves are the schema."""

from __future__ import annotations

from dataclasses import asdict, fields

import yaml
from pydantic import TypeAdapter, ValidationError

from thesean import plain_yaml
from thesean.errors import PlanError
from thesean.passes.plan.rows import PlanRows

_ROWS = TypeAdapter(PlanRows)


def dump(rows: PlanRows) -> str:
    """YAML text of the rows' own fields, in their order. Raises PlanError for an option that is no plain value."""
    everything = asdict(rows)
    try:
        plain = {f.name: everything[f.name] for f in fields(PlanRows)}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise PlanError(f"an option of a target can't be written as YAML: {error}. Use plain numbers.") from error


def load(text: str) -> PlanRows:
    """The inverse of `dump`. Raises PlanError that names the wrong field."""
    try:
        return _ROWS.validate_python(plain_yaml.read(text))
    except yaml.YAMLError as error:
        raise PlanError(f"the plan is not YAML: {str(error).splitlines()[0]}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if not where:
            raise PlanError("the plan is YAML, but not a mapping with parts. Write one with to_yaml.") from error
        raise PlanError(f"plan field {where}: {first['msg']}.") from error
