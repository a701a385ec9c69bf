"""The blocks of a network: runs of regions that repeat, and what is like them."""

from __future__ import annotations

import torch

from thesean.passes.analyse.chains import branches, chains, segments_of
from thesean.passes.analyse.dataflow import DataFlow
from thesean.passes.analyse.fingerprint import fingerprint, operator_kinds
from thesean.passes.analyse.regions import Region, is_linear_map, is_single_entry_single_exit, join
from thesean.passes.analyse.siblings import mend

# repeats that cover less than this share of the heavy segments are a coincidence, not the model's structure
_COVERAGE = 0.6
# a segment with fewer nodes holds no two residual blocks
_SMALLEST_NEST = 8


def carries_tensors(region: Region) -> bool:
    """Entry and exit are one tensor each; a node with several outputs (an LSTM's tuple) can't be either."""
    return all(isinstance(n.meta.get("val"), torch.Tensor) for n in (region.entry, region.exit))


def halves(flow: DataFlow, region: Region) -> list[Region]:
    """The residual branches inside a region, in order, and in place of one that holds a block those of the block, as in
    x + block(x) / 2; empty when it has none.
    """
    found: list[Region] = []
    for branch in outer_halves(flow, region):
        alone = flow.within(branch.entry, branch.nodes)  # its first sum and the region's read the same node
        several = sum(s.is_residual() for s in segments_of(alone, branch)) > 1
        found.extend(halves(alone, branch) if several else [branch])
    return found


def outer_halves(flow: DataFlow, region: Region) -> list[Region]:
    """The branches beside a region's own stream, in order, whatever is inside of them."""
    return [b for s in segments_of(flow, region) if s.is_fork() for b in branches(flow, s)]


def pieces(flow: DataFlow, region: Region) -> list[Region]:
    """A region from entry to exit, in order: residual branches with or without a matrix, and each stretch between."""
    found: list[Region] = []
    stretch: list[Region] = []
    for segment in [*segments_of(flow, region), None]:
        inner = branches(flow, segment, light=True) if segment is not None and segment.is_fork() else []
        if segment is not None and not inner:
            stretch.append(segment)
            continue
        if stretch:
            found.append(join(stretch[0], stretch[-1], stretch[1:-1]))
            stretch = []
        found.extend(inner)
    return found


def halves_or_whole(flow: DataFlow, block: Region) -> list[Region]:
    return halves(flow, block) or [block]


def find_blocks(flow: DataFlow, within: Region | None = None) -> list[Region]:
    """Disjoint single-entry single-exit regions, in order: repeats first, then what is like them, then lone residuals.

    Each chain (`chains`) is searched for runs of isomorphic groups of segments; the same groups are looked for
    in the other chains; what is left over and residual is a part of its own, unless smaller repeats are inside of it.
    Where repeats cut through modules of one list, the modules win (`siblings`).
    """
    rows = chains(flow, within)
    forked = any(s.is_fork() and s.is_heavy() for row in rows for s in row)
    taken: list[set[int]] = [set() for _ in rows]
    found: list[Region] = []
    forms: dict[tuple[object, ...], int] = {}

    def take(number: int, start: int, period: int) -> None:
        row = rows[number]
        taken[number].update(range(start, start + period))
        found.append(join(row[start], row[start + period - 1], row[start + 1 : start + period - 1]))

    for number, row in enumerate(rows):
        for start, period, count in _repeats(row, forked):
            for at in range(start, start + period * count, period):
                take(number, at, period)
                forms[tuple(fingerprint(s) for s in row[at : at + period])] = period
    for number, row in enumerate(rows):
        exact = [fingerprint(s) for s in row] if forms else []
        for at in range(len(row)):
            for form, period in forms.items():
                if tuple(exact[at : at + period]) == form and taken[number].isdisjoint(range(at, at + period)):
                    take(number, at, period)
    for number, row in enumerate(rows):
        whole = not taken[number]  # a chain without repeats: any heavy fork; else what is surely a block
        for at, segment in enumerate(row):
            lone = at not in taken[number] and (segment.is_residual() or (whole and segment.is_fork()))
            if lone and segment.is_heavy():
                inner = find_blocks(flow, segment) if len(segment.nodes) > _SMALLEST_NEST else []
                several = len(inner) > 1 and all(_has_residual(flow, b) for b in inner)
                found.extend(inner if several else [segment])
    found = [r for r in found if is_single_entry_single_exit(flow, r)]  # a value inside may leave by another output
    # a gate or a pool alone, such as softmax(score(x)) x, may be no block that the network is made of
    unsure = not found or not (forms or any(s.is_residual() for s in found))
    if within is None and rows and unsure:
        row = max(rows, key=len)
        if _perceptron(row):
            plain = [block for each in rows for block in _perceptron(each)]
        else:
            plain = [s for s in row if s.is_heavy()][:-1]  # every linear map but the last, the head
        plain = [s for s in plain if is_single_entry_single_exit(flow, s)]
        found = plain if not found or 2 * _maps(found) < _maps(plain) else found
    if within is None:
        found = mend(flow, rows, found)
    return sorted(found, key=lambda r: flow.order[r.exit])


def _perceptron(row: list[Region]) -> list[Region]:
    """All of a chain whose only maps are two of vectors or tokens: what lies between them is read by the second."""
    heavy = [s for s in row if s.is_heavy()]
    if len(heavy) != 2 or any(_MAPS.isdisjoint(n.target for n in s.nodes) for s in heavy):
        return []
    first, last = heavy
    return [join(first, last, row[row.index(first) + 1 : row.index(last)])]


_MAPS = {torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default}


def _maps(regions: list[Region]) -> int:
    """Linear maps in them."""
    return sum(is_linear_map(node) for region in regions for node in region.nodes)


def _has_residual(flow: DataFlow, block: Region) -> bool:
    return any(s.is_residual() for s in segments_of(flow, block))


def _repeats(row: list[Region], forked: bool) -> list[tuple[int, int, int]]:
    """(start, period, count) of the runs that cover most of a chain, by exact repeats or by kinds of operators."""
    # mixing without a matrix has its place in a block beside the sums, as in x = fourier(x); x = x + mlp(x)
    matrix = [any(is_linear_map(n) for n in s.nodes) for s in row]
    weight = [s.is_heavy() and (s.is_fork() or not forked or not m) for s, m in zip(row, matrix, strict=True)]
    if sum(weight) < 2:
        return []
    most, best = 0, []
    for signature in (fingerprint, operator_kinds):
        ids: dict[object, int] = {}
        signatures = [ids.setdefault(signature(s), len(ids)) for s in row]
        runs = _tandem_runs(signatures, weight)
        covered = sum(weight[i] for start, period, count in runs for i in range(start, start + period * count))
        # the head of a plain network is heavy and never repeats
        if covered > most and covered >= _COVERAGE * max(1, sum(weight) - (not forked)):
            most, best = covered, runs
    return best


def _tandem_runs(signatures: list[int], weight: list[bool], offset: int = 0) -> list[tuple[int, int, int]]:
    """(start, period, count) of disjoint repeats, in order: the one with most weight first, then the rest."""
    best: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    size = len(signatures)
    total = sum(weight)
    for period in range(1, size // 2 + 1):
        start = 0
        while start + 2 * period <= size:
            if not weight[start]:
                start += 1
                continue
            end = start + period
            while end < size and signatures[end] == signatures[end - period]:
                end += 1
            count = (end - start) // period
            if count >= 2:
                score = sum(weight[start : start + period * count])
                key = (score, -period, -start)
                if best is None or key > best[0]:
                    best = (key, (start, period, count))
                start += period * (count - 1)
            start += 1
        if best is not None and best[0][0] == total:
            break  # a longer period can't cover more
    if best is None:
        return []
    start, period, count = best[1]
    stop = start + period * count
    return [
        *_tandem_runs(signatures[:start], weight[:start], offset),
        (start + offset, period, count),
        *_tandem_runs(signatures[stop:], weight[stop:], offset + stop),
    ]
