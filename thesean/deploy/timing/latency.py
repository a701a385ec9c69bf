"""How long a file takes in onnxruntime: medians of interleaved runs, so that a busy machine slows all alike.

B batch, T time
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from thesean.deploy.encoder_decoder import export_network
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays, arrays_of
from thesean.deploy.timing.turns import Timing, measure
from thesean.errors import DataError, ExportError
from thesean.passes.graph.signature import Signature

CONTEXTS = (64, 512, 2048)

_SECONDS = 2.0  # a file


@dataclass(frozen=True, kw_only=True)
class FileTimings:
    """One file's figures. A context that the file can't run (past the guide's position table) is None.

    `token` is the cost of one more token once `context` tokens are there. `token_kind` says how: "state" is one step
    with the state carried; "recompute" reads all `context` tokens again, as a file without state must. None where no
    file of the comparison decodes.
    `forward` is set instead of both where there is no time dimension.
    """

    prefill: dict[int, Timing | None]
    token: dict[int, Timing | None]
    token_kind: str | None
    forward: Timing | None = None

    def figures(self) -> dict[str, Timing | None]:
        """By "prefill_64" and "token_64", or "forward"."""
        figures: dict[str, Timing | None] = {f"prefill_{c}": v for c, v in self.prefill.items()}
        figures |= {f"token_{c}": v for c, v in self.token.items()}
        if self.forward is not None:
            figures["forward"] = self.forward
        return figures

    def medians_ms(self) -> dict[str, float | None]:
        """`{"prefill_64": 1.2, "token_64": 0.1}`, or `{"forward": 0.3}`."""
        return {k: None if v is None else v.median_ms for k, v in self.figures().items()}


def latency_of_models(
    paths: Mapping[str, str | Path],
    signature: Signature,
    contexts: Sequence[int] = CONTEXTS,
    batch: int = 1,
    repeats: int = 20,
    settle: float | None = None,
    lean: bool = False,
) -> dict[str, FileTimings]:
    """Files that take the same inputs, side by side, on one thread.

    Prefill at each context; and where at least one file carries a state, one more token at each context, for a file
    without state by reading everything again. Without a dynamic time dimension: one forward. `settle` as in `measure`;
    `lean` as in `Session`, for files that together would hold too much.
    Raises ExportError for a file that onnxruntime can't load.
    """
    sessions = {name: Session(path, threads=1, lean=lean) for name, path in paths.items()}
    seconds = _SECONDS * max(3, len(sessions))  # for all together: many files are no reason for few turns

    def taken(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        return measure(calls, repeats, seconds, settle=settle)

    if not signature.lengths:
        feeds = random_feeds(signature, batch, None)
        forward = taken({n: _prefill(s, feeds) for n, s in sessions.items()})
        return {n: FileTimings(prefill={}, token={}, token_kind=None, forward=v) for n, v in forward.items()}
    decodes = any(s.is_stateful for s in sessions.values())
    prefill: dict[str, dict[int, Timing | None]] = {n: {} for n in sessions}
    token: dict[str, dict[int, Timing | None]] = {n: {} for n in sessions}
    for context in contexts:
        feeds = random_feeds(signature, batch, context)
        states = {n: state_after(s, feeds) for n, s in sessions.items()}
        whole = taken({n: _prefill(s, feeds) for n, s in sessions.items() if states[n] is not None})
        one = random_feeds(signature, batch, 1)
        stateful = {n: s for n, s in sessions.items() if s.is_stateful and states[n] is not None}
        steps = taken({n: _step(s, s.step_after(feeds, one), states[n]) for n, s in stateful.items()})
        for name, session in sessions.items():
            prefill[name][context] = whole.get(name)
            if decodes:
                token[name][context] = steps.get(name) if session.is_stateful else whole.get(name)
    kinds = {n: ("state" if s.is_stateful else "recompute") if decodes else None for n, s in sessions.items()}
    return {n: FileTimings(prefill=prefill[n], token=token[n], token_kind=kinds[n]) for n in sessions}


def benchmark(
    graph_module: fx.GraphModule,
    signature: Signature,
    *,
    guide: fx.GraphModule | None = None,
    contexts: Sequence[int] = CONTEXTS,
    batch: int = 1,
    repeats: int = 20,
    train_length: int | None = None,
) -> tuple[dict[str, FileTimings], str]:
    """Both modules in onnxruntime, in the same turns: "converted" and "guide", and why the guide is not among them.

    Raises ExportError when the module can't be exported and MissingExtraError.
    """
    note = ""
    with tempfile.TemporaryDirectory() as folder:

        def written(module: fx.GraphModule, name: str) -> Path:
            return export_network(module, signature, f"{folder}/{name}.onnx", train_length=train_length).path

        paths = {"converted": written(graph_module, "converted")}
        if guide is not None:
            try:
                paths["guide"] = written(guide, "guide")
            except ExportError as error:
                note = f"the guide was not timed: {error}"
        return latency_of_models(paths, signature, contexts, batch, repeats), note


def random_feeds(signature: Signature, batch: int, length: int | None) -> Arrays:
    """Arrays of these sizes for a network with this signature."""
    sizes = {s: batch if s.startswith("batch") else length or 1 for s in signature.symbols}
    return arrays_of(signature.random_inputs(sizes))


def state_after(session: Session, feeds: Arrays) -> Arrays | None:
    """The state after these inputs ({} without one); None when the file can't run them."""
    try:
        return session.run_whole(feeds)[1]
    except DataError:
        return None


def _prefill(session: Session, feeds: Arrays) -> Callable[[], Any]:
    return lambda: session.run_whole(feeds)


def _step(session: Session, feeds: Arrays, state: Arrays | None) -> Callable[[], Any]:
    return lambda: session.run(feeds, state)
