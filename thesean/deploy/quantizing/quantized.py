"""A quantised file beside the exact one that it is made of: divergence, agreement, latency, bytes.

B batch, T time
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from thesean.deploy.onnx_file import PARITY_SEEN, WEIGHTS, WEIGHTS_HASH, Draft, metadata
from thesean.deploy.parity import IN_TORCH, Check, allowed_error, largest
from thesean.deploy.quantizing.samples import Judge, Samples
from thesean.deploy.quantizing.tools import Quantize, quantize_file
from thesean.deploy.relative_error import relative_error
from thesean.deploy.session import Session
from thesean.deploy.states import arrays_of
from thesean.deploy.timing.turns import measure
from thesean.errors import DataError, ExportError
from thesean.passes.analyse.chunks import join, split_inputs
from thesean.passes.graph.signature import Signature

QUANTIZED = "thesean.quantized"  # in the metadata

# Largest errors of outputs, of their scale. Found for the demo and its guide, trained, on text: 0.035, 0.04 and 0.14;
# for 13 small networks of random weights, on random inputs, at most 0.10, 0.18 and 0.4, but for one of 0.8.
QUANTIZED_PARITY: dict[str, float] = {"int8": 0.15, "int8-static": 0.2, "int4": 0.5}

# Where a file is held to the caller's own held-out samples, inputs made of the example may be off by as much. A
# pretrained decoder in 4 bits is off by 0.3 on text, and by 0.6 to 0.93 on its tokens in another order. What is further
# off than two outputs of one scale can be is broken.
UNRELATED = 2.0

# The least scale of outputs: whole numbers lose a share of whatever there is, where float32 loses digits of what was
# added up on the way.
_LEAST = 1e-6

HELD_OUT = "quantised vs exact"  # the label of a check on samples

COARSE = (
    "These weights don't bear so few bits: try quantize='int8', leave quantize= out, or raise tolerance= if that is "
    "good enough for you."
)

_CHUNKS = (3, 1)  # and the rest


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What whole numbers cost and gain. Each pair of latencies is of the exact file and of this one, medians in ms on
    one thread: `whole_ms` of one held-out sequence, `step_ms` of one step after it where the file carries a state.

    `divergence` is the mean distance from the exact file's outputs on the held-out samples, in `unit`; `agreement` the
    share of their steps at which both give the same answer, None where outputs are no classes. `products` and
    `embeddings`, tables whose rows are looked up, hold whole numbers in place of `share` of the weights. `apart`: the
    distance of the file in chunks from itself at once.
    """

    form: str
    products: int
    share: float
    calibrated: int
    samples: str
    divergence: float
    unit: str
    agreement: float | None
    apart: float | None
    exact_bytes: int
    whole_ms: tuple[float, float]
    step_ms: tuple[float, float] | None
    embeddings: int = 0

    def __str__(self) -> str:
        how = f", calibrated on {self.calibrated} batches" if self.calibrated else ""
        agree = "" if self.agreement is None else f", the same answer at {self.agreement:.2%}"
        speed = [f"{a:.3g} -> {b:.3g} ms a {what}" for what, (a, b) in self._latencies()]
        tables = f" and {self.embeddings} embedding{'s' * (self.embeddings > 1)}" if self.embeddings else ""
        lines = [
            f"  {self.form}: {self.products} products{tables}, {self.share:.0%} of the weights{how}",
            f"  from the exact file on {self.samples}: {self.divergence:.2e} {self.unit}{agree}",
            f"  the exact file has {self.exact_bytes / 1e6:.2f} MB; {'; '.join(speed)}",
        ]
        if self.apart and self.form == "int8":
            lines.append(
                f"  chunks are {self.apart:.2e} {self.unit} from a whole sequence: activations have one scale a call, "
                "that all its rows and steps share"
            )
        return "\n".join(lines)

    def _latencies(self) -> Iterator[tuple[str, tuple[float, float]]]:
        yield "sequence" if self.step_ms else "forward", self.whole_ms
        if self.step_ms:
            yield "step", self.step_ms

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def check_form(form: Any, dtype: Any) -> None:
    """Raises ExportError for what is no form of a quantised file, or has another precision asked for beside."""
    if form not in get_args(Quantize):
        raise ExportError(f"quantize: expected one of {', '.join(get_args(Quantize))}, found {form!r}.")
    if dtype not in (None, torch.float32, "float32"):
        raise ExportError(f"quantize={form!r} starts from float32: leave dtype={dtype} out.")


def quantized(
    drafted: Draft, form: Quantize, samples: Samples, signature: Signature, beside: bool | None
) -> tuple[Quantized, list[Check]]:
    """Write the quantised file in the draft's place, and compare it with the exact one, which goes with the draft's
    folder, on the held-out samples. Raises ExportError.
    """
    import onnx_ir as ir

    exact_path = drafted.path.with_name("exact.onnx")
    exact_bytes = drafted.bytes
    told = metadata(drafted.path)
    os.replace(drafted.path, exact_path)  # its weights stay where it looks for them
    exact = Session(exact_path)
    made = drafted.path.with_name("quantized.onnx")
    try:
        calibrates = form == "int8-static" or (form == "int4" and samples.are_given)
        feeds = [{**arrays_of(x), **start_of(exact, x)} for x in samples.calibration] if calibrates else []
        found = quantize_file(exact_path, made, form, feeds)
        model = ir.load(made)
        model.metadata_props.clear()
        model.metadata_props.update({k: v for k, v in told.items() if k not in (WEIGHTS, WEIGHTS_HASH, PARITY_SEEN)})
        drafted.weights = None
        drafted.write(model, beside)
        whole = Session(drafted.path)
        judge = samples.judged(_observed(exact, signature, samples.held_out[0]))
        divergence, agreement, checks = _compared(exact, whole, samples.held_out, judge)
        whole_ms, step_ms = _timed(exact, whole, signature.first_rows(samples.held_out[0], 1), signature)
        apart = _apart(whole, signature, samples.held_out[0], judge)
    except DataError as error:
        raise ExportError(f"quantize={form!r}: {error}") from error
    found_out = Quantized(
        form=form,
        products=len(found.names),
        share=found.share,
        calibrated=len(feeds),
        samples=samples.told,
        divergence=divergence,
        unit=judge.unit,
        agreement=agreement,
        apart=apart,
        exact_bytes=exact_bytes,
        whole_ms=whole_ms,
        step_ms=step_ms,
        embeddings=found.embeddings,
    )
    return found_out, checks


def held_to(
    tolerance: float, on_samples: list[Check], at_sizes: list[Check], samples: Samples, path: Path
) -> tuple[list[Check], list[str]]:
    """The checks that are within `tolerance`, and notes. All must be, unless samples are the caller's own: then those
    on them must, and of inputs made of the example it is told how far off they are. Raises ExportError.
    """
    own, at_sizes = samples.are_given, [c for c in at_sizes if c.label != IN_TORCH]
    advice = COARSE if own else f"{COARSE} These inputs are made of the example: give data= to be judged on."
    checks = [*on_samples, *at_sizes]
    allowed_error(on_samples if own else checks, tolerance, path, lambda *_: 0.0, advice)
    allowed_error(at_sizes, max(tolerance, UNRELATED), path, lambda *_: 0.0, advice)
    above = [c for c in at_sizes if c.max_abs_error > tolerance]
    told = [f"on inputs made of the example {largest(above)}, above the tolerance for {samples.told}"] if above else []
    return [c for c in checks if c not in above], told


def start_of(session: Session, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file takes beside a sequence: the states, and of a late one that every step holds a token. `inputs` are
    tensors or arrays.
    """
    first = next(iter(inputs.values()))
    given: dict[str, Any] = dict(session.zero_state(len(first))) if session.is_stateful else {}
    for name in session.inputs:
        if name not in inputs:
            given[name] = np.ones(first.shape[:2], np.bool_)
    return given


def _outputs(session: Session, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(v) for n, v in session.run(arrays_of(inputs))[0].items()}


def _observed(
    session: Session, signature: Signature, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], ...]:
    """The outputs of inputs, and of others of their shapes."""
    others = signature.random_inputs(signature.check(inputs), seed=3)
    return _outputs(session, inputs), _outputs(session, others)


def _compared(
    exact: Session, made: Session, held_out: Sequence[dict[str, torch.Tensor]], judge: Judge
) -> tuple[float, float | None, list[Check]]:
    """The mean distance, how often answers are the same, and the largest errors of each batch."""
    distances, same, rows = [], 0, 0
    checks = []
    for inputs in held_out:
        expected, found = _outputs(exact, inputs), _outputs(made, inputs)
        distances.append(judge.distance(found, expected))
        errors = [relative_error(found[name].numpy(), value.numpy(), _LEAST) for name, value in expected.items()]
        checks.append(Check.of(HELD_OUT, tuple(next(iter(inputs.values())).shape[:2]), list(expected), errors))
        for name in judge.classes:
            agree = found[name].argmax(-1) == expected[name].argmax(-1)
            same, rows = same + int(agree.sum()), rows + agree.numel()
    return float(np.mean(distances)), same / rows if rows else None, checks


def _apart(session: Session, signature: Signature, inputs: dict[str, torch.Tensor], judge: Judge) -> float | None:
    """How far a file in chunks is from itself at once. A file that is late is compared with torch alone."""
    length = next((n for s, n in signature.check(inputs).items() if not s.startswith("batch")), 0)
    if not session.is_stateful or session.delay or length <= sum(_CHUNKS):
        return None
    state, pieces = None, []
    for piece in split_inputs(signature, inputs, (*_CHUNKS, length - sum(_CHUNKS))):
        found, state = session.run(arrays_of(piece), state)
        pieces.append(found)
    whole = _outputs(session, inputs)
    joined = {n: join([torch.from_numpy(p[n]) for p in pieces], value.shape) for n, value in whole.items()}
    in_a_row = {n: value for n, value in joined.items() if isinstance(value, torch.Tensor)}
    return max(0.0, judge.distance({**whole, **in_a_row}, whole))  # rounding has signs


def _timed(
    exact: Session, made: Session, row: dict[str, torch.Tensor], signature: Signature
) -> tuple[tuple[float, float], tuple[float, float] | None]:
    feeds = arrays_of(row)
    sessions = {"exact": exact, "made": made}
    taken = measure({n: lambda s=s: s.run(feeds) for n, s in sessions.items()}, seconds=2.0)  # type: ignore[misc]
    whole = (taken["exact"].median_ms, taken["made"].median_ms)
    if not exact.is_stateful:
        return whole, None
    length = next(n for s, n in signature.check(row).items() if not s.startswith("batch"))
    one = arrays_of(split_inputs(signature, row, (1, *((length - 1,) if length > 1 else ())))[0])
    states = {n: s.run(feeds)[1] for n, s in sessions.items()}
    taken = measure({n: lambda s=s, x=states[n]: s.run(one, x) for n, s in sessions.items()}, seconds=2.0)  # type: ignore[misc]
    return whole, (taken["exact"].median_ms, taken["made"].median_ms)
