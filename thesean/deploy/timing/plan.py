"""Will it pay? The guide, the untrained plan and the ceiling in onnxruntime, before anything trains.

B batch, T time
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from thesean.deploy.loaded import require
from thesean.deploy.parity import CheckSizes
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays
from thesean.deploy.timing.latency import Timing, measure, random_feeds, state_after
from thesean.deploy.timing.networks import Networks
from thesean.deploy.timing.parts import PartTiming, latency_of_parts
from thesean.deploy.timing.verdicts import Measurement, slower_targets, verdicts
from thesean.errors import DataError, ExportError, PassRefused
from thesean.passes.analyse.positions import table_rows
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.probe import decodes
from thesean.passes.graph.dump import not_dumping
from thesean.passes.graph.modes import seeded
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.ceiling import without_parts
from thesean.passes.plan.hybrid import Hybrid, bound_positions, build_hybrid
from thesean.passes.plan.make_plan import SUPPOSED
from thesean.passes.plan.plan import Plan

logger = logging.getLogger(__name__)

_REPEATS, _SECONDS = 15, 2.0  # in turns, for all of a place together
_LEAST = 3  # a prefill of seconds is far from noise


@dataclass(frozen=True, kw_only=True)
class _Files:
    guide: Session
    plan: Session | None
    ceiling: Session | None

    def here(self) -> dict[str, Session]:
        """What could be exported, by name."""
        named = {"guide": self.guide, "plan": self.plan, "ceiling": self.ceiling}
        return {name: session for name, session in named.items() if session is not None}


@not_dumping()
def measure_plan(
    bound_plan: BoundPlan, contexts: Sequence[int] = (), batches: Sequence[int] = (1,), *, seed: int = 0
) -> Plan:
    """The plan with latencies: of whole networks at every context and batch, of single parts at the first.

    Measured side by side on one thread, medians: the guide, the plan with untrained targets (weights do not change
    how long it takes) and the ceiling, the guide without the parts that the plan replaces; prefill at each context
    and, where no output looks ahead, one more token after it. Without contexts, at the example's length; a network
    without a time dimension has one figure. `notes` say in a sentence a place whether a conversion can pay there, and
    what could not be measured. Parts by themselves include the cost of a call, some 10 microseconds.

    Raises MissingExtraError.
    """
    require("onnx", "onnxruntime", "onnxscript")
    start = time.monotonic()
    plan, captured = bound_plan.plan, bound_plan.captured
    notes: list[str] = []
    lengths, rows = _sizes(plan, captured, contexts, batches, notes)
    with seeded(seed):
        hybrid = build_hybrid(bound_plan)
        bound_positions(hybrid.graph_module)  # as in every conversion: a recurrence runs on past the guide's table
        files = _export_all(bound_plan, hybrid, notes)
        if files is None:
            return replace(plan, latencies=(), notes=(*plan.notes, *notes))
        causal = lengths != [None] and decodes(captured)
        places: list[Measurement] = []
        for batch in rows:
            for length in lengths:
                places += _place(captured, files, CheckSizes(batch=batch, length=length), causal, notes)
    parts: dict[str, PartTiming] = {}
    if places:
        parts, unmeasured = latency_of_parts(
            bound_plan, hybrid, CheckSizes(batch=places[0].batch, length=places[0].context)
        )
        slower = slower_targets(places, _by_target(bound_plan, parts), _target_names(bound_plan))
        notes = [*verdicts(places), *slower, *notes, *unmeasured]
    logger.info("measured the plan in %.0f s", time.monotonic() - start)
    return replace(
        plan,
        parts=tuple(
            replace(p, latency_ms=_median(found.before), new_latency_ms=_median(found.after))
            for p, found in ((p, parts.get(p.path, PartTiming())) for p in plan.parts)
        ),
        latencies=tuple(p.row() for p in places),
        notes=tuple(dict.fromkeys((*(n for n in plan.notes if SUPPOSED not in n), *notes))),
    )


def _sizes(
    plan: Plan, captured: Captured, contexts: Sequence[int], batches: Sequence[int], notes: list[str]
) -> tuple[list[int | None], list[int]]:
    """Lengths and batches to measure at, each once, in the order given."""
    symbols = captured.signature.symbols
    lengths: list[int | None] = list(dict.fromkeys(contexts))
    times = [s for s in symbols if not s.startswith("batch")]
    if not times:
        if lengths:
            notes.append("the guide's inputs have no dynamic time dimension: contexts are ignored")
        lengths = [None]
    elif not lengths:
        lengths = [plan.sizes[times[0]]]
    rows = list(dict.fromkeys(batches))
    if "batch" not in symbols:
        fixed = next(iter(captured.example.values())).shape[0]
        if rows != [fixed]:
            notes.append(f"the guide takes batches of {fixed} only: measured there")
        rows = [fixed]
    return lengths, rows


def _export_all(bound_plan: BoundPlan, hybrid: Hybrid, notes: list[str]) -> _Files | None:
    """Sessions of the three networks; None, with a note, when the guide itself can't be exported."""
    makers: dict[str, Callable[[], fx.GraphModule]] = {
        "guide": lambda: bound_plan.captured.graph_module,
        "plan": lambda: hybrid.graph_module,
        "ceiling": lambda: without_parts(bound_plan),
    }
    sessions: dict[str, Session] = {}
    with Networks(bound_plan.captured.signature, _example_length(bound_plan.captured)) as networks:
        for name, make in makers.items():
            try:
                sessions[name] = networks.session(name, make)
            except (ExportError, PassRefused) as error:
                told = re.sub(r"\S+\.onnx: ", "", str(error))  # the file is nothing that the caller named
                if name == "guide":
                    notes.append(f"latencies could not be measured: the guide can't be exported to ONNX: {told}")
                    return None
                notes.append(f"the {name} could not be measured: it can't be exported to ONNX: {told}")
    return _Files(guide=sessions["guide"], plan=sessions.get("plan"), ceiling=sessions.get("ceiling"))


def _example_length(captured: Captured) -> int | None:
    sizes = captured.signature.check(captured.example)
    return next((v for k, v in sizes.items() if not k.startswith("batch")), None)


def _place(captured: Captured, files: _Files, sizes: CheckSizes, causal: bool, notes: list[str]) -> list[Measurement]:
    """Prefill (or the one forward) and, for causal networks, one more token; nothing where the guide doesn't run."""
    logger.info("measuring at batch %d%s", sizes.batch, "" if sizes.length is None else f", {sizes.length} tokens")
    feeds = random_feeds(captured.signature, sizes.batch, sizes.length)
    states = {name: state_after(session, feeds) for name, session in files.here().items()}
    if states["guide"] is None:
        notes.append(f"the guide does not run at {_where(sizes)}{_table(captured, sizes)}: nothing is measured there")
        return []
    running = {name: session for name, session in files.here().items() if states[name] is not None}
    whole = measure({n: _run(s, feeds) for n, s in running.items()}, _REPEATS, _SECONDS, _LEAST)
    places = [
        Measurement(
            context=sizes.length,
            batch=sizes.batch,
            kind="forward" if sizes.length is None else "prefill",
            guide=whole["guide"],
            plan=whole.get("plan"),
            ceiling=whole.get("ceiling"),
        )
    ]
    if causal:
        places.append(_token(captured, running, states, sizes, whole))
    return places


def _token(
    captured: Captured,
    running: dict[str, Session],
    states: dict[str, Arrays | None],
    sizes: CheckSizes,
    whole: dict[str, Timing],
) -> Measurement:
    """One token: with the state where there is one, else without any past. Who must read all again keeps `whole`."""
    one = random_feeds(captured.signature, sizes.batch, 1)
    calls = {n: _run(s, one, states[n] or None) for n, s in running.items()}
    single = measure({n: call for n, call in calls.items() if _runs(call)}, _REPEATS, _SECONDS, _LEAST)
    steps = {n: s.is_stateful for n, s in running.items()}
    return Measurement(
        context=sizes.length,
        batch=sizes.batch,
        kind="token",
        guide=single.get("guide", whole["guide"]) if steps["guide"] else whole["guide"],
        plan=(single if steps.get("plan") else whole).get("plan"),
        ceiling=single.get("ceiling"),
        cache_floor=None if steps["guide"] else single.get("guide"),
        steps=steps.get("plan", False),
    )


def _run(session: Session, feeds: Arrays, state: Arrays | None = None) -> Callable[[], Any]:
    return lambda: session.run(feeds, state)


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except DataError:
        return False
    return True


def _where(sizes: CheckSizes) -> str:
    return f"batch {sizes.batch}" if sizes.length is None else f"{sizes.length} tokens"


def _table(captured: Captured, sizes: CheckSizes) -> str:
    """The likely reason."""
    rows = table_rows(captured.graph_module)
    return f", past its table of {rows} positions" if rows and sizes.length and sizes.length > rows else ""


def _target_names(bound_plan: BoundPlan) -> list[str]:
    return [p.target.name for p in bound_plan.parts if p.target is not None]


def _by_target(bound_plan: BoundPlan, parts: dict[str, PartTiming]) -> dict[str, list[tuple[Timing, Timing]]]:
    found: dict[str, list[tuple[Timing, Timing]]] = {}
    for part in bound_plan.parts:
        latency = parts.get(part.planned.path, PartTiming())
        if part.target is not None and latency.before is not None and latency.after is not None:
            found.setdefault(part.target.name, []).append((latency.before, latency.after))
    return found


def _median(latency: Timing | None) -> float | None:
    return None if latency is None else round(latency.median_ms, 4)
