"""Rewrite the README's table of planning times from benchmarks/results/plan.json.

python benchmarks/plan_table.py            # rewrites the part between <!-- table:plan --> marks
python benchmarks/plan_table.py --check    # exit 1 when the README is stale
"""

from __future__ import annotations

import sys
from typing import Any

from readme_table import rewrite

from thesean.report.markdown import provenance


def table(results: dict[str, Any]) -> str:
    """One row a guide."""
    lines = ["| guide | nodes | parts | export | plan | a node |", "|---|---:|---:|---:|---:|---:|"]
    for name, found in results["guides"].items():
        lines.append(
            f"| {name} | {found['nodes']} | {found['parts']} | {found['export_s']:.1f} s | "
            f"{found['plan_median_s']:.2f} s | {found['us_per_node']:.0f} us |"
        )
    return "\n".join([*lines, "", provenance(results)])


if __name__ == "__main__":
    sys.exit(rewrite("plan", table, __doc__))
