"""Rivals and ours as a table, and in words who is ahead of ours."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.suite import Result

# of each domain's figures, the higher the better first
_RISING = ("cosine", "top10")


def table(result: Result) -> str:
    """A row a method, the best after the steps first, medians over seeds; then a sentence a figure: who leads."""
    known = result["details"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in result["cases"]:
        rows.setdefault(row["name"], []).append(row)
    ms, domains = known["ms"], list(known["guide"])
    keys = list(known["guide"][domains[0]])
    what = " / ".join({"top10": "overlap of ten nearest"}.get(k, k) for k in keys)
    seeds = max((len(found) for found in rows.values()), default=0)
    heads = [f"{domain}, {when}" for when in ("start", "tuned") for domain in domains]
    told = (
        f"{known['context']} tokens; the guide takes {ms['guide']['ms']:.3g} ms, asked for was "
        f"{known['speedup']:g} times its speed (by the 20th percentiles). "
        f"{what[0].upper()}{what[1:]}, before any step and after "
        f"{known['steps']}; {f'medians of {seeds} seeds' if seeds > 1 else 'one seed'}. CPU seconds: of the start, and "
        "of the steps at one rate (ours: of the whole conversion, its own search for a rate in it)."
    )
    lines = [
        told,
        "",
        f"| | ms (p20 to p80) | times as fast | parameters | {' | '.join(heads)} | CPU s | rate |",
        f"|---|---:|---:|---:|{'---:|' * len(heads)}---:|---:|",
    ]
    for name, found in sorted(rows.items(), key=lambda item: _rank(item[1], domains[0], keys[0])):
        took = ms[found[0]["shape"]]
        kept = [_shown(found, when, domain, keys) for when in ("start", "tuned") for domain in domains]
        cpu = " + ".join(f"{statistics.median(r[k] for r in found):.0f}" for k in ("start_cpu_s", "cpu_s"))
        bold = f"**{name}**" if name.startswith("ours") else name
        lines.append(
            f"| {bold} | {_took(took)} | {ms['guide']['p20'] / took['p20']:.2f} | {found[0]['params'] / 1e6:.3g} M | "
            f"{' | '.join(kept)} | {cpu} | {found[0].get('rate', 'found')} |"
        )
    as_it_is = [" / ".join(f"{known['int8'][d][k]:.3f}" for k in keys) for d in domains]
    lines.append(
        f"| int8 of the guide | {_took(ms['int8'])} | {ms['guide']['p20'] / ms['int8']['p20']:.2f} | "
        f"{known['params'] / 1e6:.3g} M | {' | '.join([*as_it_is, *('' for _ in domains)])} | | |"
    )
    return "\n".join([*lines, "", *_ahead(rows, known, domains, keys)])


def _took(timing: dict[str, float]) -> str:
    return f"{timing['ms']:.3g} ({timing['p20']:.3g} to {timing['p80']:.3g})"


def _median(found: list[dict[str, Any]], when: str, domain: str, key: str) -> float:
    return statistics.median(r[when][domain][key] for r in found)


def _shown(found: list[dict[str, Any]], when: str, domain: str, keys: list[str]) -> str:
    return " / ".join(f"{_median(found, when, domain, key):.3f}" for key in keys)


def _rank(found: list[dict[str, Any]], domain: str, key: str) -> float:
    value = _median(found, "tuned", domain, key)
    return -value if key in _RISING else value


def _ahead(
    rows: dict[str, list[dict[str, Any]]], known: dict[str, Any], domains: list[str], keys: list[str]
) -> list[str]:
    """A sentence a stage, domain and figure: our best, and the rivals ahead of it."""
    own = {name: found for name, found in rows.items() if name.startswith("ours")}
    others = {name: found for name, found in rows.items() if name not in own}
    lines = []
    for when, told in (("start", "Before any step"), ("tuned", "After the steps")):
        for domain in domains:
            for key in keys if own else ():
                sign = 1 if key in _RISING else -1
                best = max(own, key=lambda n: sign * _median(own[n], when, domain, key))
                value = _median(own[best], when, domain, key)
                ahead = {n: _median(f, when, domain, key) for n, f in others.items()}
                if when == "start" and known["ms"]["int8"]["p20"] <= known["ms"]["guide"]["p20"] / known["speedup"]:
                    ahead["int8 of the guide"] = known["int8"][domain][key]
                ahead = {n: v for n, v in ahead.items() if sign * v > sign * value}
                names = ", ".join(f"{n} ({v:.3f})" for n, v in ahead.items()) or "nobody"
                lead = f"- {told}, {domain}, {key}: our best is {best.removeprefix('ours: ')} ({value:.3f})"
                lines.append(f"{lead}; ahead of it: {names}.")
    return lines
