"""The tables of README, docs and benchmarks/README.md, filled from committed results: `python -m benchmarks --readme`.
With a table of docs/ goes the benchmark's picture, if it has one: docs/pictures/NAME.svg.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`, in any Markdown file of the root, docs/ or
benchmarks/. NAME is a benchmark's, or "benchmarks" for the list of all. A figure of uncommitted code is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.suite import RESULTS, ROOT, BenchmarkError, Case, Result, find_cases, is_clean, pick, read_result
from thesean.report.markdown import provenance
from thesean.write_file import write_text

LIST = "benchmarks"
PICTURES = ROOT / "docs" / "pictures"

_MARK = re.compile(r"<!-- (/?)table:([\w-]+) -->")


def replace_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between `<!-- table:name -->` and `<!-- /table:name -->` replaced.

    Raises ValueError unless the two marks are there once each, in that order.
    """
    start, stop = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if text.count(start) != 1 or text.count(stop) != 1 or text.index(start) > text.index(stop):
        raise ValueError(f"expected {start} and then {stop}, once each")
    head, rest = text.split(start)
    return f"{head}{start}\n{table}\n{stop}{rest.split(stop)[1]}"


def names(text: str) -> list[str]:
    """The tables that `text` has marks for."""
    return list(dict.fromkeys(name for _, name in _MARK.findall(text)))


def fill(text: str, make: Callable[[str], str]) -> str:
    """`text` with every table that it has marks for made anew. Raises ValueError as `replace_table` does."""
    for name in names(text):
        text = replace_table(text, name, make(name))
    return text


def markdown_files() -> list[Path]:
    """The files that may hold marks."""
    return sorted(p for folder in ("*.md", "docs/**/*.md", "benchmarks/*.md") for p in ROOT.glob(folder))


def fill_all(write: bool = True) -> list[Path]:
    """Fill every Markdown file, and draw the pictures in them; returns those that were stale. Raises ValueError, naming
    the file, for marks amiss.
    """
    cases = find_cases()
    stale = []
    for path, svg in pictures(cases).items():
        if not path.exists() or path.read_text(encoding="utf-8") != svg:
            stale.append(path)
            if write:
                write_text(path, svg, parents=True)
    for path in markdown_files():
        before = path.read_text(encoding="utf-8")
        try:
            after = fill(before, lambda name: made(name, cases))
        except ValueError as error:
            raise BenchmarkError(f"{path.relative_to(ROOT)}: {error}.") from error
        if after != before:
            stale.append(path)
            if write:
                path.write_text(after, encoding="utf-8")
    return stale


def made(name: str, cases: Mapping[str, Case], folder: Path = RESULTS) -> str:
    """The table of a committed result, and where it was measured. Raises BenchmarkError for uncommitted code."""
    if name == LIST:
        return list_of(cases, folder)
    case = pick(cases, name)
    path = folder / f"{name}.json"
    if case.table is None or not path.exists():
        raise BenchmarkError(f"table:{name} has no {'figures' if case.table else 'table'}: expected {path.name}.")
    result = read_result(path)
    if not is_clean(result["commit"]):
        raise BenchmarkError(
            f"table:{name}: {path.name} was measured at {result['commit'] or 'no commit'}: figures of uncommitted code "
            f"stand in no table. Commit, then `python -m benchmarks {name} --record`, or take the table out."
        )
    drawn = f"![{case.question}](pictures/{name}.svg)\n\n" if case.picture is not None else ""
    return f"{drawn}{case.table(result)}\n\n{measured(result)}"


def pictures(cases: Mapping[str, Case], folder: Path = RESULTS) -> dict[Path, str]:
    """What docs/ shows, of results of committed code."""
    found = {}
    for name, case in cases.items():
        path = folder / f"{name}.json"
        if case.picture is not None and path.exists() and is_clean((result := read_result(path))["commit"]):
            found[PICTURES / f"{name}.svg"] = case.picture(result)
    return found


def measured(result: Result) -> str:
    """Machine, versions, commit, seeds, date: a line."""
    seeds = result["seeds"]
    said = {"seed": seeds[0]} if len(seeds) == 1 else {"seeds": seeds or None}
    return provenance({"environment": result["environment"] | {"commit": result["commit"]}, **said})


def list_of(cases: Mapping[str, Case], folder: Path = RESULTS) -> str:
    """question | script | result | minutes."""
    lines = ["| question | script | result | minutes |", "|---|---|---|---:|"]
    for name, case in cases.items():
        module = case.run.__module__.removeprefix("benchmarks.").replace(".", "/")
        lines.append(f"| {case.question} | `{module}.py` | {_standing(folder / f'{name}.json')} | {case.minutes:g} |")
    return "\n".join(lines)


def _standing(path: Path) -> str:
    if not path.exists():
        return "not measured yet"
    result = read_result(path)
    if is_clean(result["commit"]):
        return f"[{path.name}](results/{path.name})"
    code = "uncommitted code" if result["commit"] else "a commit that it doesn't name"
    return f"[{path.name}](results/{path.name}), of {code}: in no table until it is measured again"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> list[str]:
    """The lines of a table; what stands behind the first `names` columns is a figure."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * names}{'---:|' * (len(heads) - names)}"]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]


def mean_and_ends(values: Sequence[float], digits: int = 4) -> str:
    """Of seeds; "-" where there is none."""
    if not values:
        return "-"
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{ends}"


def unmeasured(result: Result) -> list[str]:
    """What stands below a table of which some runs are missing, for want of time."""
    left_out = len(result["details"].get("left_out", ()))
    of = left_out + len(result["cases"])
    return ["", f"{left_out} of {of} runs are not measured yet."] if left_out else []
