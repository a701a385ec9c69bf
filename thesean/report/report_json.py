"""report.json: what a conversion measured, for people's scripts and for the README's tables."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thesean.errors import ArtifactError
from thesean.report.table import Row, sort_rows

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
    Raises ArtifactError for a folder that can't be written, a value that isn't JSON, or a reserved key in `extra`.
    """
    path = Path(path)
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)
    except OSError as error:
        raise ArtifactError(
            f"{path}: the report can't be written ({error.strerror or error}). Choose a folder that you may write."
        ) from error
    return path


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report as a dict, "rows" as a list of dicts. Raises ArtifactError when it is missing or incomplete."""
    path = Path(path)
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


def _write_whole(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the report from colleagues
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
