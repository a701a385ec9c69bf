"""report.json: what a conversion measured, for people's scripts and for the README's tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thesean.errors import ArtifactError
from thesean.report.table import Row, sort_rows
from thesean.scratch import named
from thesean.write_file import write_text

KEYS = ("rows", "stages", "environment")


def write_report(
    path: str | os.PathLike[str],
    rows: Iterable[Row],
    stages: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write {"rows", "stages", "environment", **extra} as JSON; NaN and infinity become null.

    The file takes its name when it is complete: an interrupted or refused write leaves an earlier report as it was.
    Raises WriteError, and ArtifactError for a value that isn't JSON, or a reserved key in `extra`.
    """
    path = named(path)
    taken = [key for key in KEYS if key in (extra or {})]
    if taken:
        raise ArtifactError(f"{path}: extra may not hold {taken[0]!r}, which the report fills. Give it another name.")
    report = {
        "rows": [row.to_dict() for row in sort_rows(rows)],
        "stages": [dict(stage) for stage in stages],
        "environment": dict(environment or {}),
        **(extra or {}),
    }
    try:
        text = json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: the report holds a value that JSON can't carry: {error}.") from error
    return write_text(path, text, parents=True)


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report as a dict, "rows" as a list of dicts. Raises ArtifactError when it is missing or incomplete."""
    path = named(path, "read", ArtifactError)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: the report can't be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise ArtifactError(
            f"{path}: expected JSON, found something else ({error}). Run the conversion again."
        ) from error
    missing = [key for key in KEYS if not isinstance(report, dict) or key not in report]
    if missing:
        raise ArtifactError(f"{path}: expected the keys {', '.join(KEYS)}; {missing[0]!r} is missing.")
    report_rows(report, str(path))
    return dict(report)


def report_rows(report: Mapping[str, Any], where: str = "report") -> list[Row]:
    """The rows of a report that was read. Raises ArtifactError for a row without a name or with an unknown key."""
    rows = []
    for number, values in enumerate(report["rows"]):
        try:
            rows.append(Row(**{**values, "latency_ms": values.get("latency_ms") or {}}))
        except (TypeError, AttributeError) as error:
            raise ArtifactError(f"{where}: row {number} is not a row of this version ({error}).") from error
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
