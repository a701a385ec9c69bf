"""What a choice costs: parameters and FLOPs are sums over parts, latency is measured on whole hybrids.

Latencies of parts do not add up (a graph optimiser fuses across them, caches are shared), so the additive model only
proposes: base + sum over parts of what the candidate takes there by itself, less what the guide's own part does. Where
parts can't be timed by themselves, as for one more token with a state, it is what the candidate changed in a hybrid
where all parts of the same structure have it, divided by their number. What is proposed is then measured itself, and
what was measured corrects the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import fx

from thesean.choose.candidates import Candidates, Choice
from thesean.choose.constraints import Constraints
from thesean.deploy.parity import CheckSizes
from thesean.deploy.quantizing.tools import quantize_file
from thesean.deploy.timing.latency import FileTimings, Timing, latency_of_models
from thesean.deploy.timing.networks import Networks
from thesean.deploy.timing.parts import cut_out, cut_replaced, time_cuts
from thesean.errors import ExportError, PlanError
from thesean.passes.analyse.mixing import probe_mixing
from thesean.passes.graph.extract import Extract
from thesean.passes.graph.surgery import clone
from thesean.passes.plan.bind import BoundPlan
from thesean.passes.plan.hybrid import bound_positions, build_hybrid
from thesean.passes.plan.sites import build_site
from thesean.recipe import Positions

logger = logging.getLogger(__name__)

_REPEATS = 15

# Medians are taken until they are known to this share of themselves, or their seconds are over
_SETTLED = 0.03


class PlanTimer:
    """Measures plans in one place and way; every figure comes with the guide's from the same turns, since a machine's
    speed drifts between runs. Milliseconds, onnxruntime, one thread. Use as a context manager.
    """

    def __init__(
        self, candidates: Candidates, constraints: Constraints, length: int | None, positions: Positions = "clamp"
    ) -> None:
        """`length` of the training sequences, None where there is no time; `positions` past the guide's table, as in
        the recipe.
        """
        self.captured, self.constraints, self.length, self.positions = (
            candidates.binder.captured, constraints, length, positions
        )  # fmt: skip
        self._networks = Networks(self.captured.signature, length)

    def __enter__(self) -> PlanTimer:
        self._networks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._networks.__exit__(*error)

    @property
    def context(self) -> int | None:
        return None if self.length is None else self.constraints.context or self.length

    def measure(self, bound_plans: Sequence[BoundPlan]) -> tuple[Timing, list[Timing | None]]:
        """(the guide's, each plan's), all in turns; None for a plan that has no such latency. Raises PlanError where
        the guide does not run at the context, ExportError.
        """
        return self._measured([self.export(p) for p in bound_plans])

    def beside_guide(self, path: Path) -> tuple[Timing, Timing | None]:
        """(the guide's, that of another file which does what the guide does), as `measure`."""
        guide, (found,) = self._measured([path], are_guides=True)
        return guide, found

    def guide_in_int8(self) -> Path:
        """The guide's file with weights of 8 bits, by onnxruntime's tools. Raises ExportError."""
        exact = self._guide()
        made = exact.with_name(f"{exact.stem}.int8.onnx")
        quantize_file(exact, made, "int8", ())
        return made

    def _measured(self, paths: Sequence[Path], are_guides: bool = False) -> tuple[Timing, list[Timing | None]]:
        files = {"guide": self._guide()} | {str(i): path for i, path in enumerate(paths)}
        contexts = [self.context] if self.context is not None else []
        found = latency_of_models(files, self.captured.signature, contexts, self.constraints.batch, _REPEATS, _SETTLED)
        guide = self._figure(found.pop("guide"), is_guide=True)
        if guide is None:
            raise PlanError(
                f"constraints: the guide has no {self.constraints.kind} latency at context {self.context}; choose one "
                "that it can run."
            )
        return guide, [self._figure(timings, are_guides) for timings in found.values()]

    def alone(self, cuts: Mapping[tuple[int, int], Callable[[], Extract]]) -> dict[tuple[int, int], float] | None:
        """Parts by themselves; None where one of them can't be timed so."""
        sizes = CheckSizes(batch=self.constraints.batch, length=self.context)
        found, refused = time_cuts(cuts, self.captured.signature, sizes, _SETTLED)
        if refused:
            logger.info("parts are timed within whole networks: %s", next(iter(refused.values())))
            return None
        return {key: timing.median_ms for key, timing in found.items()}

    def export(self, bound_plan: BoundPlan) -> Path:
        """The file of a plan's hybrid, written once; the guide's where it replaces nothing. Raises ExportError."""
        if not bound_plan.plan.replaced:
            return self._guide()
        key = tuple(f"{p.target}{p.options}{p.scope}" for p in bound_plan.plan.parts)
        return self._networks.file(key, lambda: self._bounded(build_hybrid(bound_plan).graph_module))

    def _guide(self) -> Path:
        return self._networks.file("guide", lambda: self._bounded(clone(self.captured.graph_module)))

    def _bounded(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        bound_positions(graph_module, self.positions)  # else a context past the guide's table can't be measured
        return graph_module

    def _figure(self, timings: FileTimings, is_guide: bool) -> Timing | None:
        """A guide that carries no state reads everything again for one more token."""
        if timings.forward is not None:
            return timings.forward
        assert self.context is not None
        if self.constraints.kind == "prefill":
            return timings.prefill.get(self.context)
        return timings.token.get(self.context) or (timings.prefill.get(self.context) if is_guide else None)


@dataclass(frozen=True, kw_only=True)
class AdditiveModel:
    """base + sum over parts of `delta[p][c]`, milliseconds; nan where a candidate can't be measured."""

    guide_ms: float
    base_ms: float
    delta: tuple[tuple[float, ...], ...]

    def of(self, choice: Sequence[int]) -> float:
        return self.base_ms + sum(row[c] for row, c in zip(self.delta, choice, strict=True))

    def corrected(self, measured: Mapping[Choice, float]) -> AdditiveModel:
        """What parts change, multiplied by what fits whole networks best, in least squares: fusing across parts and the
        cost of a call make all of them too large or too small.
        """
        pairs = [(self.of(c) - self.base_ms, ms - self.base_ms) for c, ms in measured.items() if math.isfinite(ms)]
        spread = sum(said * said for said, _ in pairs)
        factor = sum(said * found for said, found in pairs) / spread if spread > 0 else 1.0
        if factor <= 0:  # that is noise
            return self
        return replace(self, delta=tuple(tuple(factor * d for d in row) for row in self.delta))


def fit_latency(latencies: PlanTimer, candidates: Candidates, apart: bool = True) -> AdditiveModel:
    """Unless `apart` each candidate is measured within whole networks, and what can't be exported is dropped, with a
    log line. For "token" it always is, and parts that mix over time begin from their first stateful candidate: a kept
    attention would make the whole network read everything again.
    """
    if apart and latencies.constraints.kind != "token":
        found = _fit_apart(latencies, candidates)
        if found is not None:
            return found
    return _fit_within(latencies, candidates)


def _fit_apart(latencies: PlanTimer, candidates: Candidates) -> AdditiveModel | None:
    """Each kind of part and candidate by itself; None where one can't be timed so."""
    guide = candidates.binder.captured.graph_module
    cuts: dict[tuple[int, int], Callable[[], Extract]] = {}
    for p, row in enumerate(candidates.options):
        kind = candidates.classes[p]
        for c, option in enumerate(row):
            if option is None or (kind, c) in cuts or option.target is None:
                continue
            cuts.setdefault((kind, _OWN), partial(cut_out, candidates.kept[p], guide))
            cuts[kind, c] = partial(_cut_candidate, candidates, p, c)
    took = latencies.alone(cuts)
    if took is None:
        return None
    guide_ms = latencies.measure([])[0].median_ms
    # a call by itself costs some microseconds more: all parts together can't take longer than the whole
    own = sum(took.get((kind, _OWN), 0.0) for kind in candidates.classes)
    scale = min(1.0, guide_ms / own) if own else 1.0
    delta = []
    for kind, row in zip(candidates.classes, candidates.options, strict=True):
        before = took.get((kind, _OWN), 0.0)
        delta.append(tuple((took.get((kind, c), before) - before) * scale for c in range(len(row))))
    return AdditiveModel(guide_ms=guide_ms, base_ms=guide_ms, delta=tuple(delta))


_OWN = -1  # in the place of a candidate: the guide's part


def _cut_candidate(candidates: Candidates, part: int, candidate: int) -> Extract:
    bound_plan = candidates.alone(part, candidate)
    return cut_replaced(bound_plan.parts[part], build_hybrid(bound_plan, share=True))


def _fit_within(latencies: PlanTimer, candidates: Candidates) -> AdditiveModel:
    """One hybrid for each kind of part and candidate."""
    reference = _reference(candidates, latencies.constraints)
    kinds: dict[tuple[int, int], list[int]] = {}
    for p, row in enumerate(candidates.options):
        for c, option in enumerate(row):
            if option is not None and c != reference[p]:
                kinds.setdefault((candidates.classes[p], c), []).append(p)
    bound_plans, members = [candidates.bind(reference)], [((-1, -1), [0])]
    for key, parts in kinds.items():
        if latencies.constraints.kind == "token" and not _decodes(candidates, parts[0], key[1]):
            continue
        bound_plan = candidates.bind([key[1] if p in parts else c for p, c in enumerate(reference)])
        try:
            latencies.export(bound_plan)
        except ExportError as error:
            logger.warning("candidate %s is left out: %s", candidates.names[key[1]], error)
            continue
        bound_plans.append(bound_plan)
        members.append((key, parts))
    guide, values = latencies.measure(bound_plans)
    base = values[0]
    if base is None:
        raise PlanError(
            f"constraints: no plan has a {latencies.constraints.kind} latency at context {latencies.context}; choose "
            "one that the candidates can run."
        )
    share = {
        key: math.nan if v is None else (v.median_ms - base.median_ms) / len(parts)
        for v, (key, parts) in zip(values[1:], members[1:], strict=True)
    }
    delta = tuple(
        tuple(0.0 if c == reference[p] else share.get((candidates.classes[p], c), math.nan) for c in range(len(row)))
        for p, row in enumerate(candidates.options)
    )
    return AdditiveModel(guide_ms=guide.median_ms, base_ms=base.median_ms, delta=delta)


def _reference(candidates: Candidates, constraints: Constraints) -> list[int]:
    reference = []
    for p in range(len(candidates.options)):
        fitting = candidates.fitting(p)
        if constraints.kind == "token":
            decoding = [c for c in fitting if _decodes(candidates, p, c)]
            if not decoding:
                path = candidates.kept[p].planned.path
                raise PlanError(
                    f"constraints: kind='token' needs a candidate that carries a state, or drops the part, for {path}; "
                    "found none. Add 'rnn' or 'gru' to candidates, or bound the prefill."
                )
            mixes = probe_mixing(candidates.kept[p].region, candidates.binder.values) != "none"
            stateful = [c for c in decoding if _is_stateful(candidates, p, c)] if mixes else []
            kept = [c for c in decoding if candidates.targets[c] is None]
            reference.append((stateful or kept or decoding)[0])
            continue
        kept = [c for c in fitting if candidates.targets[c] is None]
        reference.append(kept[0] if kept else fitting[0])
    return reference


def _decodes(candidates: Candidates, part: int, candidate: int) -> bool:
    """Whether a part with this candidate can take one token at a time: token-wise, dropped, or with a state."""
    option = candidates.options[part][candidate]
    assert option is not None
    if _is_stateful(candidates, part, candidate):
        return True
    mixes = probe_mixing(option.region, candidates.binder.values) != "none"
    return not mixes or (option.target is not None and all(s.removes for s in option.sites))


def _is_stateful(candidates: Candidates, part: int, candidate: int) -> bool:
    option = candidates.options[part][candidate]
    if option is None or option.target is None:
        return False
    return any(getattr(build_site(s), "stateful", False) for s in option.sites)
