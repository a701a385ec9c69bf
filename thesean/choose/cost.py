"""What a choice costs: parameters and FLOPs are sums over parts, latency is measured on whole hybrids.

Latencies of parts do not add up (a graph optimiser fuses across them, caches are shared), so the additive model only
proposes: base + sum over parts of what the candidate changed in a hybrid where all parts of the same structure have it,
divided by their number. What is proposed is then measured itself.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thesean.choose.candidates import Candidates
from thesean.choose.constraints import Constraints
from thesean.deploy.export import export
from thesean.deploy.latency import latency_of_models
from thesean.errors import ExportError, PassRefused, PlanError
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.drafter import Draft
from thesean.passes.hybrid import build_hybrid
from thesean.passes.probe import probe_mixing
from thesean.passes.sites import build_site
from thesean.passes.substitute import clone

logger = logging.getLogger(__name__)

_REPEATS = 15


@dataclass
class Latencies:
    """Measures drafts in one place and way; every figure comes with the guide's from the same turns, since a machine's
    speed drifts between runs. Milliseconds, onnxruntime, one thread. Use as a context manager.
    """

    candidates: Candidates
    constraints: Constraints
    length: int | None  # of the training sequences; None where there is no time
    positions: Literal["clamp", "wrap", "refuse"] = "clamp"  # past the guide's table, as in the recipe
    _files: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Latencies:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def context(self) -> int | None:
        return None if self.length is None else self.constraints.context or self.length

    def measure(self, drafts: Sequence[Draft]) -> tuple[float, list[float]]:
        """(the guide's, each draft's), all in turns. Raises PlanError where the guide doesn't run at the context or a
        plan has no such latency.
        """
        captured = self.candidates.drafter.captured
        files = {"guide": self._file(None)} | {str(i): self._file(d) for i, d in enumerate(drafts)}
        contexts = [self.context] if self.context is not None else []
        batch = self.constraints.batch
        found = latency_of_models(files, captured.signature, contexts, batch, _REPEATS)
        values = []
        for name, latency in found.items():
            if latency.forward is not None:
                figure = latency.forward
            else:
                assert self.context is not None
                table = latency.prefill if self.constraints.kind == "prefill" else latency.token
                figure = table.get(self.context) or (latency.prefill[self.context] if name == "guide" else None)  # type: ignore[assignment]
            if figure is None:
                who = "the guide" if name == "guide" else "a plan"
                raise PlanError(
                    f"constraints: {who} has no {self.constraints.kind} latency at context {self.context}; choose one "
                    "that it can run."
                )
            values.append(figure.median_ms)
        return values[0], values[1:]

    def _file(self, draft: Draft | None) -> Path:
        """The ONNX file of an untrained hybrid, written once; weights do not change how long it takes.

        A draft that replaces nothing has the guide's file.
        """
        if draft is not None and not draft.plan.replaced:
            draft = None
        key = ("guide",) if draft is None else tuple(f"{p.target}{p.options}{p.scope}" for p in draft.plan.parts)
        if key not in self._files:
            captured = self.candidates.drafter.captured
            module = clone(captured.graph_module) if draft is None else build_hybrid(draft).graph_module
            with suppress(PassRefused):  # then a context past the guide's table can't be measured
                BoundPositions(self.positions)(module)
            path = Path(self._folder.name) / f"{len(self._files)}.onnx"
            export(module, captured.signature, path, train_length=self.length)
            logger.info("wrote %s", key)
            self._files[key] = path
        return self._files[key]


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """base + sum over parts of `delta[p][c]`, milliseconds; nan where a candidate can't be measured."""

    guide_ms: float
    base_ms: float
    delta: tuple[tuple[float, ...], ...]

    def of(self, choice: Sequence[int]) -> float:
        return self.base_ms + sum(row[c] for row, c in zip(self.delta, choice, strict=True))


def fit_latency(latencies: Latencies, candidates: Candidates) -> LatencyModel:
    """One hybrid for each kind of part and candidate. Candidates that can't be exported are dropped, with a log line.

    For "token", parts that mix over time begin from their first stateful candidate: a kept attention would make the
    whole network read everything again.
    """
    reference = _reference(candidates, latencies.constraints)
    kinds: dict[tuple[int, int], list[int]] = {}
    for p, row in enumerate(candidates.options):
        for c, option in enumerate(row):
            if option is not None and c != reference[p]:
                kinds.setdefault((candidates.classes[p], c), []).append(p)
    drafts, members = [candidates.draft(reference)], [((-1, -1), [0])]
    for key, parts in kinds.items():
        if latencies.constraints.kind == "token" and not _decodes(candidates, parts[0], key[1]):
            continue
        draft = candidates.draft([key[1] if p in parts else c for p, c in enumerate(reference)])
        try:
            latencies._file(draft)
        except ExportError as error:
            logger.warning("candidate %s is left out: %s", candidates.names[key[1]], error)
            continue
        drafts.append(draft)
        members.append((key, parts))
    guide, values = latencies.measure(drafts)
    base = values[0]
    share = {key: (v - base) / len(parts) for v, (key, parts) in zip(values[1:], members[1:], strict=True)}
    delta = tuple(
        tuple(
            0.0 if c == reference[p] else share.get((candidates.classes[p], c), float("nan")) for c in range(len(row))
        )
        for p, row in enumerate(candidates.options)
    )
    return LatencyModel(guide_ms=guide, base_ms=base, delta=delta)


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
            mixes = probe_mixing(candidates.kept[p].region, candidates.drafter.values) != "none"
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
    mixes = probe_mixing(option.region, candidates.drafter.values) != "none"
    return not mixes or (option.target is not None and all(s.removes for s in option.sites))


def _is_stateful(candidates: Candidates, part: int, candidate: int) -> bool:
    option = candidates.options[part][candidate]
    if option is None or option.target is None:
        return False
    return any(getattr(build_site(s), "stateful", False) for s in option.sites)
