"""Write an ONNX file that onnxruntime was seen to run with the torch module's numbers.

B batch, T time
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import fx

from thesean.deploy.describe_values import describe_values
from thesean.deploy.export_passes import for_export
from thesean.deploy.export_report import (
    PARITY,
    ExportReport,
    Form,
    Stateful,
    check_runtime,
    check_words,
    parse_dtype,
    parse_stateful,
)
from thesean.deploy.genai.folder import Served, write_genai
from thesean.deploy.loaded import require
from thesean.deploy.lowering.choose_operators import choose_operators
from thesean.deploy.lowering.to_onnx import output_names, parse_opset, to_onnx
from thesean.deploy.onnx_file import (
    DELAY,
    GUIDE,
    IDS,
    OPERATORS,
    PARITY_SEEN,
    ROWS,
    SIZES,
    STATES,
    TOGETHER,
    UNCHECKED,
    UNTRIED,
    Draft,
    draft,
)
from thesean.deploy.parity import (
    Check,
    CheckSizes,
    allowed_error,
    compare_all,
    not_comparable,
    refuses_negative,
    rounding,
    untried,
    untried_of,
)
from thesean.deploy.quantizing.quantized import (
    QUANTIZED,
    QUANTIZED_PARITY,
    Quantized,
    check_form,
    held_to,
    quantized,
)
from thesean.deploy.session import Session
from thesean.deploy.torch_file import SUFFIX, write_torch
from thesean.deploy.traced_sizes import of_stream, traced_sizes
from thesean.errors import DataError, ExportError, PassRefused
from thesean.passes.base import Attempt, Pass, run_passes
from thesean.passes.cast_floats import CastFloats, cast_signature, cast_tensor, dtypes_for
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.graph.stream import STREAM, delay_of
from thesean.passes.thread_state import STATE_IN, STATE_OUT, state_shape
from thesean.scratch import named

_STATES = re.compile(r"^(cache attention|delay steps|thread state): ")  # how the refusals of a state begin

_TOGETHER = "the rows of a batch count their steps together: start them together"

_LONG = 64  # steps, where the example's are not known
_REMEMBERED = 3  # steps of the states to trace with: not the batch, which would be taken for the same


def export(
    graph_module: fx.GraphModule,
    signature: Signature,
    path: str | Path,
    *,
    stateful: Stateful = "auto",
    opset: int | None = None,
    tolerance: float | None = None,
    train_length: int | None = None,
    **form: Unpack[Form],
) -> ExportReport:
    """Export `graph_module` in eval mode, compare with it in onnxruntime, and only then let the file take its name.

    Inputs have the guide's names and dynamic dimensions "batch" and "time"; outputs the guide's keys. A stateful file
    takes `state_in_0`... (zeros start a sequence) and returns `state_out_0`..., so that one file serves prefill and
    decoding; "auto" makes one where the whole network is causal, and says in `note` why not elsewhere. An attention
    that was kept has its keys and values as state, whose dimension "past" is 0 at the start. Where parts look ahead,
    outputs come `delay` steps late, the first ones void, and one more input, `seen`, is True where a token comes in:
    as many steps without bring out the last ones.
    Compared at (2,7), (2,19), (5,3), (1,1) and four times `train_length`, as far as the module itself runs there, and
    in chunks where it carries a state. The module, its parameters and its flags stay as they were.

    `dtype`: torch.float32, the default whatever the network's own, or torch.float16; file and torch are compared in
    that precision, by default to `PARITY` of the output's scale, and where the network amplifies rounding to what
    `parity.allowed_error` says. `external_data`: the weights in a file of their own beside `path`; None: where they are
    too large for one, past 2 GiB. `about`: what the file's metadata say, beside the states and the parity that was
    seen. `check`: "skip" writes, and tells, what can't be compared as torch gives no finite number; what can be
    compared is. `quantize`: whole numbers for weights, by onnxruntime's tools; the exact file is made and compared
    first, and `samples` say what the other one is calibrated and judged on.

    A `path` that ends in .pt2 is torch's own form: see `torch_file.write_torch`. `runtime`: "genai" makes a folder for
    onnxruntime-genai, with the files of `tokenizer`: see `genai.folder.write_genai`; "portable" writes operators of
    ONNX itself alone, and no functions.

    Raises ExportError, WriteError (nothing is left behind and an earlier file stays) and MissingExtraError.
    """
    runtime, tokenizer = form.pop("runtime", "onnxruntime"), form.pop("tokenizer", None)
    if check_runtime(runtime, tokenizer, named(path), form) == "genai":
        if parse_stateful(stateful) is False:
            raise ExportError("stateful: runtime='genai' decodes step by step; expected 'auto' or 'yes', found 'no'.")
        write = partial(
            export, graph_module, signature,
            stateful=True, opset=opset, tolerance=tolerance, train_length=train_length, **form,
        )  # fmt: skip
        return write_genai(write, Served.of(graph_module, signature), named(path), tokenizer)
    if named(path).suffix == SUFFIX:
        return _export_torch(
            graph_module, signature, named(path), parse_stateful(stateful), tolerance, train_length, opset, form
        )
    require("onnx", "onnxruntime", "onnxscript")
    start = time.monotonic()
    wanted = parse_stateful(stateful)
    check_words(form)
    if form.get("quantize") is not None:
        check_form(form.get("quantize"), form.get("dtype"))
    asked = _Asked(
        module=graph_module,
        signature=signature,
        path=named(path),
        dtype=parse_dtype(form.get("dtype")),
        opset=parse_opset(opset),
        portable=runtime == "portable",
        tolerance=tolerance,
        train_length=train_length,
        form=form,
    )
    try:
        report = _write(asked, wanted)
    except _StateFailed as failure:
        if wanted:
            raise
        report = _write(asked, False)  # what stands in the way of any file stands in this one's too
        report = replace(report, note="; ".join(n for n in (f"without state: {failure}", report.note) if n))
    return replace(report, seconds=time.monotonic() - start)


def _export_torch(
    graph_module: fx.GraphModule,
    signature: Signature,
    path: Path,
    wanted: bool | None,
    tolerance: float | None,
    train_length: int | None,
    opset: int | None,
    form: Form,
) -> ExportReport:
    """Raises ExportError, for what is said of ONNX alone too."""
    given = {"opset": opset, **{k: v for k, v in form.items() if k not in ("about", "samples")}}
    if meant := [k for k, v in given.items() if v is not None and v not in ("all", "auto")]:
        raise ExportError(f"{path}: {', '.join(meant)} is for ONNX files alone. Leave it out, or write an .onnx file.")
    dtypes = dtypes_for(graph_module, signature, None)
    signature = cast_signature(signature, dtypes)
    module, _ = run_passes(graph_module, FreezeOnCpu(), CastFloats(dtypes))
    lowered, note = _lower(module, for_export(signature, _probes(signature, train_length), wanted))
    allowed = PARITY[torch.float32] if tolerance is None else tolerance
    return write_torch(module, lowered, signature, path, train_length, note, allowed, asked=tolerance is not None)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a file is to be made of, and how."""

    module: fx.GraphModule
    signature: Signature
    path: Path
    dtype: torch.dtype | None
    opset: int
    portable: bool
    tolerance: float | None
    train_length: int | None
    form: Form


class _StateFailed(ExportError):
    """A file that carries a state could not be written, or doesn't give the network's numbers."""


def _write(asked: _Asked, wanted: bool | None) -> ExportReport:
    """One file, compared. Raises ExportError, WriteError; _StateFailed where it may do without its state."""
    path, train_length = asked.path, asked.train_length
    dtypes = dtypes_for(asked.module, asked.signature, asked.dtype)
    signature = cast_signature(asked.signature, dtypes)
    file_dtype = asked.dtype or torch.float32
    tolerance = PARITY[file_dtype] if asked.tolerance is None else asked.tolerance
    if isinstance(tolerance, bool) or not isinstance(tolerance, float | int) or not 0 < tolerance < float("inf"):
        raise ExportError(f"tolerance: expected a number above 0, found {tolerance!r}.")
    into = asked.form.get("into")
    # first of all: an unwritable folder should not cost an export
    with draft(path) if into is None else nullcontext(into) as drafted:
        module, _ = run_passes(asked.module, FreezeOnCpu(), CastFloats(dtypes))  # what the file is compared with
        lowered, note = _lower(module, for_export(signature, _probes(signature, train_length), wanted))
        names = output_names(module)
        states: tuple[InputSpec, ...] = lowered.meta.get("states", ())
        threaded = lowered if states else None
        stream = lowered.meta.get(STREAM, signature) if states else signature
        inputs = (*stream.inputs, *states)
        outputs = (*names, *(STATE_OUT + s.name.removeprefix(STATE_IN) for s in states))
        delay = delay_of(lowered) if states else 0
        told = {DELAY: json.dumps({"steps": delay, "seen": stream.inputs[-1].name})} if delay else {}
        if threaded is not None and not threaded.meta["rows_are_alone"]:
            note, told[ROWS] = _TOGETHER, TOGETHER
        if constants := untried_of(threaded):
            told[UNTRIED] = json.dumps(constants)
        if ids := {s.name: s.high for s in signature.inputs if s.high and refuses_negative(module, signature, s.name)}:
            told[IDS] = json.dumps(ids)
        if origin := signature.origin.to_json():
            told[GUIDE] = json.dumps(origin)
        if signature.bounds:
            told[SIZES] = json.dumps([bound.to_json() for bound in signature.bounds])
        try:
            example = _example(module, signature, stream, states, train_length)
            model = to_onnx(lowered, example, inputs, outputs, asked.opset, asked.portable)
            written, told_of = choose_operators(model, asked.form.get("operators", "auto"))
            told |= {OPERATORS: written} if written else {}
            describe_values(model, signature, delay)
            model.metadata_props.update(_about(states, {**told, **asked.form.get("about", {})}))
            drafted.write(model, asked.form.get("external_data"))
            checks, skipped = _compare(_checked(drafted), module, threaded, signature, names, train_length, path)
            unchecked = not_comparable(checks)
            if unchecked and asked.form.get("check", "all") != "skip":
                raise ExportError(
                    f"{path}: {unchecked}. No file was written. Convert with data= or example_inputs= that the network "
                    "is finite on: checks are made of them. check='skip' writes it all the same, and says so."
                )
            skipped += [told_of] if told_of else []
            skipped += [untried(constants)] if constants else []
            skipped += [f"not checked, as check='skip' allows: {unchecked}"] if unchecked else []
            exact, is_asked = partial(rounding, module, signature), asked.tolerance is not None
            tolerance, amplifies = allowed_error(checks, tolerance, path, exact, asked=is_asked)
            skipped += [amplifies] if amplifies else []
        except ExportError as error:
            if threaded is None:
                raise
            raise _StateFailed(str(error)) from error
        drafted.tell({PARITY_SEEN: json.dumps([c._asdict() for c in checks])})
        made: Quantized | None = None
        if quantize := asked.form.get("quantize"):
            samples = asked.form.get("samples")
            assert samples is not None, "whoever asks for a quantised file says what it is judged on"
            samples = samples.each(lambda x: {n: cast_tensor(v, dtypes) for n, v in x.items()})
            made, seen = quantized(drafted, quantize, samples, signature, asked.form.get("external_data"))
            tolerance = QUANTIZED_PARITY[quantize] if asked.tolerance is None else asked.tolerance
            found, _ = _compare(_checked(drafted), module, threaded, signature, names, train_length, path)
            checks, apart = held_to(tolerance, seen, found, samples, path)
            skipped += apart
            drafted.tell({QUANTIZED: made.to_json(), PARITY_SEEN: json.dumps([c._asdict() for c in checks])})
        if unchecked:
            drafted.tell({UNCHECKED: unchecked})
        size = drafted.bytes
        if into is None:
            drafted.publish()
    return ExportReport(
        path=path,
        bytes=size,
        opset=model.opset_imports[""],
        stateful=threaded is not None,
        inputs=tuple(s.name for s in inputs),
        outputs=outputs,
        checks=tuple(checks),
        tolerance=tolerance,
        seconds=0.0,
        note="; ".join([*([note] if note else []), *skipped]),
        delay=delay,
        dtype=str(file_dtype).removeprefix("torch."),
        weights=drafted.weights,
        operators=written,
        quantized=made,
    )


def _checked(drafted: Draft) -> Session:
    """The file to compare; weights beside it, which may be larger than what is left of the memory, stay there."""
    return Session(drafted.path, mapped=drafted.weights is not None)


def _about(states: tuple[InputSpec, ...], told: Mapping[str, str]) -> dict[str, str]:
    """What a file says of itself beside its maker: the states and what starts them."""
    table = [
        {
            "name": s.name,
            "dtype": str(s.dtype).removeprefix("torch."),
            "shape": list(s.shape),
            "start": "zeros" if all(state_shape(s.shape, batch=1, past=0)) else "nothing",
        }
        for s in states
    ]
    return {STATES: json.dumps(table), **told} if states else dict(told)


def _probes(signature: Signature, train_length: int | None) -> tuple[dict[str, torch.Tensor], ...]:
    """Inputs of several lengths, where time is dynamic."""
    lengths = (1, 7, 19, train_length or _LONG) if signature.lengths else (None,)
    sizes = dict.fromkeys(CheckSizes(batch=2, length=length).within(signature) for length in lengths)
    return tuple(signature.random_inputs(s.of(signature)) for s in sizes)


def _compare(
    session: Session,
    module: fx.GraphModule,
    threaded: fx.GraphModule | None,
    signature: Signature,
    names: tuple[str, ...],
    train_length: int | None,
    path: Path,
) -> tuple[list[Check], list[str]]:
    try:
        return compare_all(session, threaded, module, signature, names, train_length)
    except DataError as error:
        raise ExportError(f"{path}: the file does not run where the module does: {error}") from error


def _lower(module: fx.GraphModule, passes: Sequence[Pass | Attempt]) -> tuple[fx.GraphModule, str]:
    """What torch's exporter is given, and why it carries no state where that was asked for. Raises ExportError."""
    try:
        lowered, notes = run_passes(module, *passes)
    except PassRefused as refusal:
        if _STATES.match(str(refusal)):
            raise ExportError(
                f"a stateful export is not possible: {refusal} Export with stateful='no', or convert what is left."
            ) from refusal
        raise ExportError(f"the module can't be written: {refusal}") from refusal
    refused = [_STATES.sub("", n.reason) for n in notes if n.outcome == "refused"]
    return lowered, f"without state: {refused[0]}" if refused else ""


def _example(
    module: fx.GraphModule,
    signature: Signature,
    stream: Signature,
    states: tuple[InputSpec, ...],
    train_length: int | None,
) -> dict[str, torch.Tensor]:
    """Inputs to trace with: sizes of 2 and more, so that none is taken for a constant."""
    lengths = (7, 19, train_length or _LONG) if signature.lengths else (None,)
    sizes = next(traced_sizes(module, signature, [(2, length) for length in lengths]), None)
    if sizes is None:
        raise ExportError(f"the module runs at none of the lengths {lengths}. Pass train_length=, one that it takes.")
    example = stream.random_inputs(of_stream(sizes, stream))
    for spec in states:
        example[spec.name] = torch.zeros(state_shape(spec.shape, batch=2, past=_REMEMBERED), dtype=spec.dtype)
    return example
