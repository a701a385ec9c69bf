"""Rewrite the README's table of a pretrained encoder's conversions from benchmarks/results/minilm.json.

python benchmarks/minilm_table.py            # rewrites the part between <!-- table:minilm --> marks
python benchmarks/minilm_table.py --check    # exit 1 when the README is stale
"""

from __future__ import annotations

import sys
from typing import Any

from readme_table import rewrite

from thesean.report.markdown import provenance

_STAGES = ("closed form", "tuned")


def table(results: dict[str, Any]) -> str:
    """What the plan says, what `auto` chooses, and each conversion's fidelity to the guide."""
    told = results["will_it_pay"]["notes"]
    lines = [
        *(f"> {note}  " for note in told),
        "",
        f"`auto` at 1.5 times the guide's speed at 128 tokens: {results['auto']['notes'][0].partition(': ')[2]}.",
        "",
        *(_conversions(results) if "guide" in results["conversions"] else []),
    ]
    return "\n".join([*lines, provenance(results)])


def _conversions(results: dict[str, Any]) -> list[str]:
    """Speed-ups at each context, fidelity after the closed form and after tuning."""
    rows = results["conversions"]
    guide = {c: rows["guide"]["ms"][f"prefill_{c}"] for c in (32, 128, 512)}
    heads = [f"speed-up at {c}" for c in guide]
    lines = [
        f"Cosine with the guide's embeddings / overlap of ten nearest neighbours, {results['steps']} steps:",
        "",
        f"| conversion | parameters | {' | '.join(heads)} | closed form | tuned |",
        f"|---|---:|{'---:|' * len(heads)}---:|---:|",
    ]
    for name, row in rows.items():
        if name == "guide":
            continue
        speed = " | ".join(f"{ms / row['ms'][f'prefill_{c}']:.2f}" for c, ms in guide.items())
        kept = " | ".join(f"{row[s]['cosine']:.3f} / {row[s]['top10']:.3f}" for s in _STAGES)
        lines.append(f"| {name} | {row['params'] / 1e6:.1f} M | {speed} | {kept} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(rewrite("minilm", table, __doc__))
