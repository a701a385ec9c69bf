"""Sizes at which the guide goes another way than the traced one: a graph holds one branch, and no word of the others.

torch.export keeps what it assumed of sizes, as guards. Most are its own (is this contiguous?) and change no number, so
both sides of each are tried: where the guide runs and the graph gives other numbers or none, the guide branches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from thesean.passes.analyse.positions import table_rows
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.convention import same_outputs, tensors, thinned, void
from thesean.passes.capture.explain import short
from thesean.passes.capture.probe import PROBE
from thesean.passes.graph.nodes import argument, named_dim
from thesean.passes.graph.signature import Bound

aten = torch.ops.aten

logger = logging.getLogger(__name__)

Guide = Callable[[dict[str, torch.Tensor]], Any]
Sizes = Mapping[str, int]

# Steps that a guide is run with for this, more where it is quick; where a guard breaks later, it is taken at its word.
_NEAR, _FARTHEST = 2048, 2**16
_QUICK = 1.0  # seconds that half as many steps take
_UNBOUNDED = 2**20  # a guard that holds as far as that never breaks
_ONE_BY_ONE = 512  # sizes around the example that are looked at, so that a guard on remainders is seen to be one

_NUMBERS = 2**20  # of an output that are compared

_ROWS, _STEPS = 2, 8  # where another dimension is tried, as far as the guards let them


@dataclass(frozen=True)
class Guard:
    """What the trace took for granted of sizes by these names."""

    names: frozenset[str]
    holds: Callable[[Sizes], bool]


@dataclass(frozen=True)
class Fixed:
    """A dimension that has to be the example's size: at `size` the guide computes otherwise, or doesn't run."""

    name: str
    size: int
    runs: bool = True
    column: bool = False  # one for each feature of a table

    def describe(self) -> str:
        return f"its code {'goes another way' if self.runs else 'does not run'} at {self.size}"


def columns(captured: Captured) -> Fixed | None:
    """A dimension of an input of which nothing is read but one place after another, by its number: those are features,
    as of a table, and no steps.
    """
    graph_module = captured.graph_module
    for node in graph_module.graph.find_nodes(op="placeholder"):
        sizes = {d: named_dim(n, graph_module.meta["symbols"]) for d, n in enumerate(node.meta["val"].shape)}
        readers = [user for user in node.users if user.target is not aten.sym_size.int]
        for dim, name in sizes.items():
            picks = [u.target is aten.select.int and argument(u, 1, "dim") % len(sizes) == dim for u in readers]
            places = [argument(u, 2, "index") for u in readers if u.target is aten.select.int]
            if (
                isinstance(name, str)
                and not name.startswith("batch")
                and len(set(places)) > 1
                and all(picks)
                and min(places) >= 0
            ):
                return Fixed(name, max(places), column=True)
    return None


@torch.no_grad()
def bound_sizes(captured: Captured, guide: Guide) -> Captured | Fixed:
    """The guide and its graph compared on both sides of every guard, at a size of one, and beside the example's.

    The captured guide with the bounds of its branch in the signature, a note for each; or the dimension that no bounds
    are right for.
    """
    signature, guards = captured.signature, _guards(captured)
    trials = _Trials(captured, guide)
    bounds, notes = [], []
    shortest = {}
    for name in (n for n in signature.symbols if not n.startswith("batch")):
        around = _Around(name, trials.example, guards)
        shortest[name] = trials.shortest(around)
        if shortest[name] > 1:  # a raw signal, of which a window takes hundreds
            if trials.differs(around.at(shortest[name] + 1)) is None:
                return Fixed(name, shortest[name] + 1, runs=False)
            guards.append(Guard(frozenset([name]), lambda sizes, n=name: sizes[n] >= shortest[n]))  # type: ignore[misc]
    for name in signature.symbols:
        around = _Around(name, trials.example, guards)
        breaks = {guard: around.breaks(guard) for guard in around.guards}
        far = trials.reach(around, max((above or 0 for _, above in breaks.values()), default=0))
        tried = {n: trials.differs(around.at(n)) for n in around.to_try(breaks, table_rows(captured.graph_module), far)}
        other = sorted((n for n, differs in tried.items() if differs), key=around.distance)
        guilty = around.guilty(tried)
        told = other[0] if other else 0
        if not guilty and not around.untried:
            if other:  # and no guard says where
                return Fixed(name, told)
            if (least := shortest.get(name, 1)) > 1:
                bounds.append(Bound(name=name, least=least))
                notes.append(f"{name}: {bounds[-1].describe()}, for the guide does not run on less.")
            continue
        if crowd := {n for g in guilty for n in g.names} - {name}:
            steps = next((n for n in (name, *sorted(crowd)) if not n.startswith("batch")), name)
            return Fixed(steps, told)
        least, most = around.interval((*guilty, *around.untried))
        least = max(least, shortest.get(name, 1))
        inside = {n for n in (least, most, around.own + 1, around.own * 2 + 1) if n is not None and least <= n}
        wrong = [n for n in sorted(inside) if n <= min(most or n, far) and trials.differs(around.at(n))]
        if least == most or wrong:
            return Fixed(name, wrong[0] if wrong else told)
        bounds.append(Bound(name=name, least=least, most=most))
        notes.append(_told(bounds[-1], told))
    signature = replace(signature, bounds=tuple(bounds))
    return replace(captured, signature=signature, notes=(*captured.notes, *notes))


def _told(bound: Bound, size: int) -> str:
    seen = f"at {size} its code goes another way" if size else "its code asks for that"
    return (
        f"{bound.name}: {bound.describe()}, other sizes are refused: the guide was traced at such a size, and {seen}. "
        "Example inputs of other sizes give the other branch."
    )


class _Trials:
    """The guide beside its graph, at each size once."""

    def __init__(self, captured: Captured, guide: Guide) -> None:
        self.captured, self.guide = captured, guide
        self.example: Sizes = captured.signature.check(captured.example)
        self._known: dict[tuple[tuple[str, int], ...], bool | None] = {}

    def reach(self, around: _Around, wanted: int) -> int:
        """Up to which size the guide may be run: further than usual as long as half of it is quick."""
        size = _NEAR
        while size < min(wanted, _FARTHEST):
            start = time.monotonic()
            self.differs(around.at(size))
            if time.monotonic() - start > _QUICK:
                break
            size *= 2
        return size

    def shortest(self, around: _Around) -> int:
        """The least size at which the guide runs, as a kernel wants so many steps; 1 where there is none."""
        if self._runs(around, 1) or not self._runs(around, around.own):
            return 1
        probed = min(PROBE, around.own)
        if not self._runs(around, probed):
            return self._least(around, probed, around.own)
        least = self._least(around, 1, probed)
        kept = all(self._runs(around, n) == (n >= least) for n in range(1, probed))  # else it asks for a remainder
        return least if kept else 1

    def _least(self, around: _Around, fails: int, runs: int) -> int:
        while runs - fails > 1:
            middle = (fails + runs) // 2
            fails, runs = (fails, middle) if self._runs(around, middle) else (middle, runs)
        return runs

    def _runs(self, around: _Around, size: int) -> bool:
        return self.differs(around.at(size)) is not None

    def differs(self, sizes: Sizes) -> bool | None:
        """Whether the graph isn't the guide there; None where the guide itself doesn't run, or gives no number."""
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            self._known[key] = self._differs(dict(sizes))
        return self._known[key]

    def _differs(self, sizes: dict[str, int]) -> bool | None:
        device = str(next(iter(self.captured.example.values())).device)
        inputs = self.captured.signature.random_inputs(sizes, device=device)
        try:
            wanted = _thin(self.guide(inputs))
        except Exception as error:  # whatever it says: such sizes are none of the guide's
            logger.debug("the guide does not run at %s: %s", sizes, short(error))
            return None
        if not wanted or void([numbers for _, numbers in wanted]):
            return None
        try:
            found = _thin(self.captured.graph_module(**inputs))
        except Exception as error:
            logger.debug("the graph does not run at %s, where the guide does: %s", sizes, short(error))
            return True
        shapes = [[shape for shape, _ in outputs] for outputs in (found, wanted)]
        return shapes[0] != shapes[1] or not same_outputs(*([n for _, n in outputs] for outputs in (found, wanted)))


def _thin(output: Any) -> list[tuple[torch.Size, torch.Tensor]]:
    """The shapes of all tensors and a million numbers from all over each: the whole may be as large as the guide."""
    return [(value.shape, thinned(value, _NUMBERS)) for value in tensors(output)]


class _Around:
    """One dimension by name, and what the guards say of it at sizes beside the example's."""

    def __init__(self, name: str, example: Sizes, guards: list[Guard]) -> None:
        self.name, self.own = name, example[name]
        self.guards = [g for g in guards if name in g.names]
        self.untried: tuple[Guard, ...] = ()
        self._others = _small_others(name, example, guards)

    def distance(self, size: int) -> int:
        return abs(size - self.own)

    def at(self, size: int) -> Sizes:
        return {**self._others, self.name: size}

    def breaks(self, guard: Guard) -> tuple[int | None, int | None]:
        """The first sizes below and above the example's at which it doesn't hold."""
        return self._first(guard, range(self.own - 1, 0, -1)), self._first(guard, range(self.own + 1, _UNBOUNDED))

    def _first(self, guard: Guard, sizes: range) -> int | None:
        """By strides that double, and then between the last two."""
        kept, stride = -1, 1
        while kept < len(sizes) - 1:
            at = min(kept + stride, len(sizes) - 1)
            if not guard.holds(self.at(sizes[at])):
                while at - kept > 1:
                    middle = (kept + at) // 2
                    kept, at = (middle, at) if guard.holds(self.at(sizes[middle])) else (kept, middle)
                return sizes[at]
            kept, stride = at, stride * 2
        return None

    def to_try(self, breaks: Mapping[Guard, tuple[int | None, int | None]], table: int | None, most: int) -> list[int]:
        """Sizes outside of each guard, near and farther off as far as `most`; one, and one of another parity than the
        example's.

        A guard that breaks too far off for that is `untried`, and kept; where a table of positions ends there, how it
        goes on is not the trace's to say.
        """
        beside = 4 - self.own % 2 if self.name.startswith("batch") else self.own + 1
        wanted = [1, beside]
        for guard, (below, above) in breaks.items():
            if below is not None:
                wanted += [below, below // 2]
            if above is not None and above <= most:
                wanted += [above, above + 1, min(2 * above + 1, most)]
            elif above is not None and above - 1 != table:
                self.untried += (guard,)
        return [n for n in dict.fromkeys(wanted) if n >= 1 and n != self.own]

    def guilty(self, tried: Mapping[int, bool | None]) -> list[Guard]:
        """Those that are broken wherever the graph isn't the guide, and nowhere else; failing that all that are broken
        at a size which these don't account for.
        """
        bad = [n for n, differs in tried.items() if differs]
        good = [n for n, differs in tried.items() if differs is False]
        sure = [g for g in self.guards if self._broken(g, bad) and not self._broken(g, good)]
        left = [n for n in bad if not any(self._broken(g, [n]) for g in sure)]
        return sure + [g for g in self.guards if g not in sure and self._broken(g, left)]

    def _broken(self, guard: Guard, sizes: list[int]) -> bool:
        return any(not guard.holds(self.at(n)) for n in sizes)

    def interval(self, guards: tuple[Guard, ...]) -> tuple[int, int | None]:
        """The sizes around the example's at which all of them hold."""
        ends = [self.breaks(g) for g in guards]
        least = max((below + 1 for below, _ in ends if below is not None), default=1)
        most = min((above - 1 for _, above in ends if above is not None), default=None)
        near = range(max(least, self.own - _ONE_BY_ONE), min(most or _UNBOUNDED, self.own + _ONE_BY_ONE) + 1)
        for size in near:
            if not all(g.holds(self.at(size)) for g in guards):
                least, most = (max(least, size + 1), most) if size < self.own else (least, min(most or size, size - 1))
        return least, most


def _guards(captured: Captured) -> list[Guard]:
    """torch's own, and that no size is one: it takes for granted that those which are free are more."""
    names: dict[str, str] = captured.graph_module.meta["symbols"]
    found = [Guard(frozenset([n]), lambda sizes, n=n: sizes[n] > 1) for n in captured.signature.symbols]  # type: ignore[misc]
    for condition in captured.guards:
        symbols = {s: names[str(s)] for s in condition.free_symbols if str(s) in names}
        if symbols and len(symbols) == len(condition.free_symbols):  # what the data decide is no size
            found.append(Guard(frozenset(symbols.values()), _holding(condition, symbols)))
    return found


def _holding(condition: Any, symbols: Mapping[Any, str]) -> Callable[[Sizes], bool]:
    def holds(sizes: Sizes) -> bool:
        try:
            return bool(condition.subs({s: sizes[name] for s, name in symbols.items()}) != False)  # noqa: E712  sympy's
        except (ArithmeticError, TypeError, AssertionError):  # a division by nothing, or of what is less than nothing
            return False

    return holds


def _small_others(name: str, example: Sizes, guards: list[Guard]) -> Sizes:
    """The other dimensions, as small as the guards let them be."""
    sizes = dict(example)
    for other, size in example.items():
        smaller = {**sizes, other: min(size, _ROWS if other.startswith("batch") else _STEPS)}
        if other != name and all(g.holds(smaller) for g in guards):
            sizes = smaller
    return sizes
