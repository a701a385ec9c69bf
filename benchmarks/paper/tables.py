"""What the study `matrix` found, as tables; what was not measured is said so, below a table where it is a whole row."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.paper.rows import CORE, GRID, METHODS, TUNED, VARIED, Row, core, norms, tried, untuned, varied
from benchmarks.suite import Result
from benchmarks.tables import markdown
from thesean.units import milliseconds, quantity

Found = dict[str, Any]
NONE = "not measured"


class Rows:
    """A result's rows by name, and how their figures are written: percent of images, nats of characters."""

    def __init__(self, result: Result) -> None:
        self.rows: dict[str, list[Found]] = {}
        for found in result["cases"]:
            self.rows.setdefault(found["name"], []).append(found)
        for conversion, method in itertools.product(CORE, TUNED):
            grid = [f for rate in GRID for f in self.of(tried(conversion, method, rate).name)]
            if grid:  # the first seed's
                best = min(grid, key=lambda f: float(f["validation"]))
                self.rows.setdefault(f"{conversion}: {method}", []).insert(0, best)
        self.served = {found["conversion"]: found for found in result["cases"] if "unit" in found}

    def of(self, name: str) -> list[Found]:
        return [found for found in self.rows.get(name, []) if "failed" not in found]

    def is_text(self, conversion: str) -> bool:
        return conversion.startswith("GPT-2")

    def value(self, conversion: str, found: Found) -> float:
        return float(found["loss"] if self.is_text(conversion) else 100 * found["accuracy"])

    def mean(self, name: str) -> float | None:
        values = [self.value(name.split(":")[0], found) for found in self.of(name)]
        return statistics.fmean(values) if values else None

    def cell(self, name: str) -> str:
        """The mean over seeds, with its range; what went wrong; or that there is none."""
        if name not in self.rows:
            return NONE
        conversion = name.split(":")[0]
        values = [self.value(conversion, found) for found in self.of(name)]
        if not values:
            return f"failed: {self.rows[name][0]['failed']}"
        return written(self.is_text(conversion), values)

    def better(self, name: str, other: str) -> float | None:
        """By how much the first mean is better than the other one, None where one is missing."""
        mine, theirs = self.mean(name), self.mean(other)
        if mine is None or theirs is None:
            return None
        return theirs - mine if self.is_text(name) else mine - theirs


def written(text: bool, values: Sequence[float]) -> str:
    digits = 3 if text else 1
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def measured(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Rows of which nothing was measured are named below."""
    rows: dict[bool, list[Sequence[str]]] = {True: [], False: []}
    for cells in body:
        rows[any(cell not in (NONE, "-", "as above") for cell in cells[1:])].append(cells)
    told = f"Not measured: {'; '.join(cells[0] for cells in rows[False])}." if rows[False] else ""
    lines = markdown(head, rows[True]) if rows[True] else []
    return "\n\n".join(filter(None, ("\n".join(lines), told)))


def tables(result: Result) -> str:
    found = Rows(result)
    sizes = result["settings"]
    text, steps = sizes["text"], sizes["steps"]
    seeds = ", ".join(map(str, result["seeds"]))
    left_out = len(result["details"].get("left_out", []))
    told = (
        f"Test data: percent of Fashion-MNIST's images, 12,000 to train on in batches of {sizes['images']}, and "
        f"nats a character of the demo's text in batches of {text['batch']} x {text['length']}. Steps: "
        f"{steps['convnet']} for the MLP, {steps['deep_convnet']} for the shallow convnet, "
        f"{steps['VisionTransformer']} for the token-wise MLP, {steps['gpt2']} for text. Mean (lowest to highest) over "
        f"the seeds {seeds}, as far as they were measured: {left_out} rows were not."
    )
    sections = [told, matrix(found), verdict(found), variants(found), changes(found), grid(found), cost(found)]
    return "\n\n".join(section for section in [*sections, failures(found, result)] if section)


def matrix(found: Rows) -> str:
    """Conversions and guides down, methods across."""
    body = []
    for name in CORE:
        for trained in (True, False):
            served = found.served.get(name)
            guide = NONE if served is None else written(
                found.is_text(name), [found.value(name, served["guide" if trained else "untrained"])]
            )  # fmt: skip
            by = {row.what: row.name for row in core(name, untuned) if row.trained == trained}
            cells = [found.cell(by[m]) if m in by else "as above" for m in METHODS]
            body.append([f"{name}, {'trained' if trained else 'untrained'} guide", guide, *cells])
    return measured(["conversion", "guide", *METHODS], body)


def verdict(found: Rows) -> str:
    """Where the default is behind something simpler, in words."""
    lines = []
    for name in CORE:
        for trained in (True, False):
            mine = Row(conversion=name, what="default", trained=trained, changes={}).name
            gains: dict[str, float] = {}
            for method in TUNED:
                other = Row(conversion=name, what=method, trained=trained or method == "scratch", changes={}).name
                gain = found.better(mine, other)
                if gain is not None:
                    gains[method] = gain
            if gains:
                lines.append(f"- {name}, {'trained' if trained else 'untrained'} guide: {_said(gains, name, found)}")
    return "\n".join(lines)


def _said(gains: dict[str, float], name: str, found: Rows) -> str:
    unit, digits = ("nats", 3) if found.is_text(name) else ("points", 1)
    won = [f"{method} by {gain:.{digits}f}" for method, gain in gains.items() if gain > 0]
    lost = [f"{method} by {-gain:.{digits}f}" for method, gain in gains.items() if gain <= 0]
    said = [f"the default is ahead of {', '.join(won)} {unit}"] if won else []
    said += [f"**the default is behind {', '.join(lost)} {unit}**"] if lost else []
    return "; ".join(said) + "."


def variants(found: Rows) -> str:
    """Other cells, whole blocks, tokens that hear of one another."""
    names = [name for name in found.served if name not in CORE]
    body = []
    for name in [CORE[3], *names] if names else []:
        cells = [found.cell(f"{name}: {method}") for method in METHODS]
        body.append([name, *cells, *(found.cell(f"{name}: {m}, untrained guide") for m in ("default", "paper"))])
    heads = ["variants", *METHODS, "default, untrained guide", "paper, untrained guide"]
    return measured(heads, body) if body else ""


def changes(found: Rows) -> str:
    """The paper's recipe with one thing changed: what it ends at, and where its last hybrid was before fine-tuning."""
    whats = list(dict.fromkeys(["paper", *(row.what for name in VARIED for row in varied(name, untuned))]))
    body = []
    for what in whats:
        cells = []
        for name in VARIED:
            row = f"{name}: {what}"
            known = what == "paper" or any(row == r.name for r in varied(name, untuned))
            cells += [found.cell(row), hybrid(found, row), cpu(found, row)] if known else ["-"] * 3
        body.append([what, *cells])
    heads = ["from a trained guide", *(h for name in VARIED for h in (name, "last hybrid", "CPU s"))]
    normed = [
        [row.what, found.cell(row.name), hybrid(found, row.name), cpu(found, row.name)]
        for row in norms(CORE[1], untuned)
    ]
    first = f"{CORE[1]}: paper"
    normed.insert(0, ["paper (batch norm)", found.cell(first), hybrid(found, first), cpu(found, first)])
    return f"{measured(heads, body)}\n\n{measured(['norms', CORE[1], 'last hybrid', 'CPU s'], normed)}"


def hybrid(found: Rows, name: str) -> str:
    """All parts replaced and aligned, nothing fine-tuned: validation data."""
    text = found.is_text(name)
    stages = [row["stages" if text else "stage_accuracies"] for row in found.of(name)]
    values = [s[-1] if text else 100 * s[-1] for s in stages if s and s[-1] is not None]
    return written(text, [statistics.fmean(values)]) if values else "-"


def cpu(found: Rows, name: str) -> str:
    seconds = [row["cpu_s"] for row in found.of(name)]
    return f"{statistics.fmean(seconds):.0f}" if seconds else "-"


def grid(found: Rows) -> str:
    """The rates that were tried, first seed, on validation data; the best one is taken."""
    body = []
    for name in CORE:
        for method in TUNED:
            losses = [[f["validation"] for f in found.of(tried(name, method, rate).name)] for rate in GRID]
            best = min((each[0] for each in losses if each), default=None)
            cells = [f"{each[0]:.4f}" if each else NONE for each in losses]
            bold = [f"**{c}**" if each and each[0] == best else c for c, each in zip(cells, losses, strict=True)]
            body.append([f"{name}, {method}", *bold])
    return measured(["validation loss, first seed, by rate", *(f"{rate:g}" for rate in GRID)], body)


def cost(found: Rows) -> str:
    """Parameters, latencies in onnxruntime, seconds of a core."""
    body = []
    for name in CORE:
        served = found.served.get(name)
        if served is None:
            body.append([name, *[NONE] * 8])
            continue
        params = [quantity(served["params"][who]) for who in ("guide", "converted")]
        situation = next((s for s in served["latency"]["converted"] if s in ("forward", "prefill_512")), None)
        times = [served["latency"][who].get(situation) for who in ("guide", "converted")]
        cells = [NONE if t is None else milliseconds(t["median_ms"]) for t in times]
        body.append([name, *params, *cells, *(cpu(found, f"{name}: {method}") for method in METHODS)])
    heads = ["cost", "parameters: guide", "converted", "latency: guide", "converted"]
    return measured([*heads, *(f"CPU s: {method}" for method in METHODS)], body)


def failures(found: Rows, result: Result) -> str:
    """Errors, networks that ended no better than a guess, hybrids that were no better than one."""
    lines = []
    for row in result["cases"]:
        chance = found.served.get(row["conversion"], {}).get("chance")
        of = f"- {row['name']}, seed {row.get('seed')}: "
        if "failed" in row:
            lines.append(f"{of}{row['failed']}")
        elif chance is not None and "accuracy" in row:
            stages = [a for a in row["stage_accuracies"] if a is not None]
            if row["accuracy"] < 1.5 * chance:
                lines.append(f"{of}ends at chance, {100 * row['accuracy']:.1f}%.")
            elif row.get("trained", True) and stages and min(stages) < 1.5 * chance:
                at = f"{min(stages) * 100:.1f}% right after stage {stages.index(min(stages)) + 1} of {len(stages)}"
                lines.append(f"{of}a hybrid is at chance, {at}; {100 * row['accuracy']:.1f}% at the end.")
    return "\n".join(["What failed, or stood at chance on the way:", "", *(lines or ["- nothing so far."])])
