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
    """Fidelity to the guide after the closed form and after tuning, and the speed-up at each context."""
    rows = results["conversions"]
    guide = {c: rows["guide"]["ms"][f"prefill_{c}"] for c in (32, 128, 512)}
    heads = [f"speed-up at {c}" for c in guide]
    about = (
        f"Cosine with the guide's embeddings / overlap of ten nearest neighbours, {results['steps']} steps; the guide "
        f"takes {', '.join(f'{guide[c]:.1f} ms at {c}' for c in guide)} tokens."
    )
    notes = [n for n in results["will_it_pay"]["notes"] if "tokens" in n]
    lines = [
        *(f"> {note}  " for note in notes),
        "",
        f"`auto`, {results['auto']['notes'][0]}.",
        "",
        about,
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
    return "\n".join([*lines, "", provenance(results)])


if __name__ == "__main__":
    sys.exit(rewrite("minilm", table, __doc__))
