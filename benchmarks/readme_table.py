"""Rewrite a table of the README from the committed JSON that it reports.

python benchmarks/readme_table.py                      # benchmarks/results/demo.json -> <!-- table:demo -->
python benchmarks/readme_table.py results.json --check  # exit 1 when the README is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thesean.errors import TheseanError
from thesean.report import markdown_table, read_report

ROOT = Path(__file__).resolve().parent.parent


def replace_table(readme: str, name: str, table: str) -> str:
    """`readme` with the text between `<!-- table:name -->` and `<!-- /table:name -->` replaced.

    Raises ValueError unless the two marks are there once each, in that order.
    """
    start, stop = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if readme.count(start) != 1 or readme.count(stop) != 1 or readme.index(start) > readme.index(stop):
        raise ValueError(f"expected {start} and then {stop}, once each")
    head, rest = readme.split(start)
    return f"{head}{start}\n{table}\n{stop}{rest.split(stop)[1]}"


def rewrite(
    name: str, make: Callable[[dict[str, Any]], str], description: str | None, arguments: list[str] | None = None
) -> int:
    """The command line of a script that makes one table from `benchmarks/results/<name>.json`: 0, or 1 when stale."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / f"{name}.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the table is stale")
    chosen = parser.parse_args(arguments)
    table = make(json.loads(chosen.results.read_text(encoding="utf-8")))
    return _write(chosen.readme, replace_table(chosen.readme.read_text(encoding="utf-8"), name, table), chosen.check)


def _write(readme: Path, text: str, check: bool) -> int:
    stale = readme.read_text(encoding="utf-8") != text
    if check:
        print(f"{readme} is stale: run {Path(sys.argv[0]).name}" if stale else "up to date")
        return int(stale)
    readme.write_text(text, encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rewrite a table of the README from a committed report.")
    parser.add_argument("report", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / "demo.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--name", help="the mark's name; default: the report's file name")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the table is stale")
    chosen = parser.parse_args(arguments)
    try:
        before = chosen.readme.read_text(encoding="utf-8")
        after = replace_table(before, chosen.name or chosen.report.stem, markdown_table(read_report(chosen.report)))
    except (OSError, ValueError, TheseanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _write(chosen.readme, after, chosen.check)


if __name__ == "__main__":
    raise SystemExit(main())
