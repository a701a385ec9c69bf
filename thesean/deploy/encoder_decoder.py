"""An encoder-decoder as two files: the encoder's, which runs once, and the decoder's, which carries a state.

B batch, T steps of the target, S steps of the source
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import fx

from thesean.deploy.encoder_parity import Both
from thesean.deploy.export import export
from thesean.deploy.export_report import PARITY, ExportReport, Form, Stateful, parse_dtype, parse_stateful
from thesean.deploy.loaded import require
from thesean.deploy.lowering.to_onnx import output_names
from thesean.deploy.onnx_file import BESIDE_DECODER, BESIDE_ENCODER, PARITY_SEEN, Draft, draft
from thesean.deploy.parity import allowed_error, not_comparable, rounding
from thesean.deploy.quantizing.halves import samples_of_halves
from thesean.deploy.quantizing.quantized import QUANTIZED_PARITY, held_to
from thesean.deploy.session import Session
from thesean.deploy.torch_file import SUFFIX
from thesean.errors import ExportError, PassRefused
from thesean.passes.analyse.whole_inputs import source_as_long_as_target
from thesean.passes.base import run_passes
from thesean.passes.cast_floats import CastFloats, cast_signature, dtypes_for
from thesean.passes.divide_encoder import DivideEncoder
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.halves import halves_of
from thesean.passes.graph.modes import usual_settings
from thesean.passes.graph.signature import Signature
from thesean.scratch import file_sha256, named, telling

_WHOSE = re.compile(r"^(divide encoder|cache attention|delay steps|thread state): ")


@usual_settings()
def export_network(
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
    """`export`, and two files of an encoder-decoder that may carry a state: `path` is the decoder's, and
    `encoder_beside(path)` the encoder's.

    The decoder takes its tokens, the states, and what the encoder gives, `encoded_0`..., the same in every call. Each
    file is compared in onnxruntime with its half in torch, and both with the whole network, at several lengths of
    source and target, whole and in chunks. Both take their names, or none does. Where the network can't be divided, or
    its decoder carries no state, "auto" writes it as one file, and says why in `note`.

    Raises what `export` raises.
    """
    wanted = parse_stateful(stateful)
    how: dict[str, Any] = {"opset": opset, "tolerance": tolerance, "train_length": train_length, **form}
    lengths = [s for s in signature.symbols if not s.startswith("batch")]
    read = {str(n.target) for n in graph_module.graph.find_nodes(op="placeholder") if n.users}
    alike = all(s.name not in read or length in s.shape for s in signature.inputs for length in lengths)
    if wanted is False or form.get("runtime") == "genai" or not lengths:
        return export(graph_module, signature, path, stateful=stateful, **how)
    if alike or named(path).suffix == SUFFIX:
        why = partial(_as_long if alike else _in_one, graph_module, signature)
        return _write_one(graph_module, signature, path, stateful, how, why)
    require("onnx", "onnxruntime", "onnxscript")
    try:
        return _write_both(graph_module, signature, named(path), how)
    except ExportError as error:
        if wanted and not isinstance(error.__cause__, PassRefused):
            raise
        reason = str(error.__cause__ if isinstance(error.__cause__, PassRefused) else error)
    except PassRefused as refusal:
        if len(lengths) == 1:  # a network with an input beside its sequence, and no encoder: as others are
            return export(graph_module, signature, path, stateful=stateful, **how)
        reason = str(refusal)
    if wanted:
        raise ExportError(f"a stateful export is not possible: {reason} Export with stateful='no'.")
    report = export(graph_module, signature, path, stateful=False, **how)
    told = f"without state: {_WHOSE.sub('', reason)}"
    return replace(report, note="; ".join(n for n in (told, report.note) if n))


def encoder_beside(path: Path) -> Path:
    """The encoder's file, of a decoder's."""
    return path.with_name(f"{path.stem}.encoder{path.suffix}")


def _write_one(
    graph_module: fx.GraphModule,
    signature: Signature,
    path: str | Path,
    stateful: Stateful,
    how: dict[str, Any],
    why: Callable[[], str],
) -> ExportReport:
    """`export`; where it carries no state as its encoder isn't apart from its decoder, that is told: `why`, or ""."""
    try:
        report = export(graph_module, signature, path, stateful=stateful, **how)
    except ExportError as error:
        told = why() if isinstance(error.__cause__, PassRefused) else ""
        if not told:
            raise
        raise ExportError(f"a stateful export is not possible: {told}. Export with stateful='no'.") from error
    told = "" if report.stateful else why()
    return replace(report, note=f"{report.note}; {told}") if told else report


def _in_one(graph_module: fx.GraphModule, signature: Signature) -> str:
    try:
        run_passes(graph_module, DivideEncoder(signature))
    except PassRefused:
        return ""
    return (
        f"a {SUFFIX} file holds encoder and decoder in one: expected a name that ends in .onnx, of two files whose "
        "decoder carries a state"
    )


def _as_long(graph_module: fx.GraphModule, signature: Signature) -> str:
    found = source_as_long_as_target(graph_module, signature)
    if found is None:
        return ""
    return (
        f"the network reads {found[0]} as a whole and {found[1]} step by step, but takes {found[0]} only as long as "
        f"{found[1]}: expected a decoder whose length is its own, one that reads {found[0]} by attention alone"
    )


def _write_both(graph_module: fx.GraphModule, signature: Signature, path: Path, how: dict[str, Any]) -> ExportReport:
    """Raises PassRefused where the network can't be divided, ExportError, WriteError."""
    start = time.monotonic()
    divided, _ = run_passes(graph_module, DivideEncoder(signature))
    encoder, decoder, halves = halves_of(divided)
    names = output_names(graph_module)
    sides = [at_source for at_source, _ in halves.leaves]
    _name_outputs(encoder, [*halves.crossing, *(n for n, side in zip(names, sides, strict=True) if side)])
    _name_outputs(decoder, [n for n, side in zip(names, sides, strict=True) if not side])
    form, samples = how.get("quantize"), how.get("samples")
    of_source, of_target = (None, None) if samples is None else samples_of_halves(samples, encoder, halves)
    with draft(path) as second, draft(beside := encoder_beside(second.name)) as first:
        made = export(
            encoder, halves.encoder, beside, stateful=False, into=first,
            **{**how, "about": {}, "samples": of_source, "train_length": _train_length(halves.encoder, how)},
        )  # fmt: skip
        first.tell({BESIDE_DECODER: json.dumps({"file": second.name.name})})
        report = export(
            decoder, halves.decoder, path, stateful=True, into=second,
            **{**how, "samples": of_target, "train_length": _train_length(halves.decoder, how)},
        )  # fmt: skip
        told = {"file": beside.name, "sha256": file_sha256(first.path), "gives": halves.crossing}
        second.tell({BESIDE_ENCODER: json.dumps(told)})
        dtypes = dtypes_for(graph_module, signature, parse_dtype(how.get("dtype")))
        module, _ = run_passes(graph_module, FreezeOnCpu(), CastFloats(dtypes))
        whole = cast_signature(signature, dtypes)
        both = Both(encoder=Session(first.path), decoder=Session(second.path), halves=halves, names=names)
        checks, skipped = both.compare(module, whole)
        if (unchecked := not_comparable(checks)) and how.get("check", "all") != "skip":
            raise ExportError(f"{path}: {unchecked}. No file was written.")
        asked = how["tolerance"] is not None
        if form is None:
            tolerance = how["tolerance"] if asked else PARITY[next(t for t in PARITY if str(t).endswith(report.dtype))]
            tolerance, amplifies = allowed_error(checks, tolerance, path, partial(rounding, module, whole), asked=asked)
        else:
            assert samples is not None, "whoever asks for a quantised file says what it is judged on"
            tolerance, amplifies = how["tolerance"] if asked else QUANTIZED_PARITY[form], ""
            checks, apart = held_to(tolerance, [], checks, samples, path)
            skipped += apart
        seen = (*report.checks, *checks)
        second.tell({PARITY_SEEN: json.dumps([c._asdict() for c in seen])})
        size = second.bytes
        _publish(first, second)
    return replace(
        report,
        bytes=size,
        checks=seen,
        tolerance=max(tolerance, report.tolerance),
        seconds=time.monotonic() - start,
        note="; ".join(n for n in (report.note, *skipped, amplifies) if n),
        encoder=made,
    )


def _name_outputs(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    output = graph_module.graph.output_node()
    output.args = (dict(zip(names, output.args[0], strict=True)),)  # type: ignore[arg-type]
    graph_module.recompile()


def _train_length(signature: Signature, how: dict[str, Any]) -> int | None:
    """Of the half's own sequence, where the network has one."""
    if how["train_length"] is None:
        return None
    lengths = [s for s in signature.symbols if not s.startswith("batch")]
    return next((signature.example_sizes[s] for s in lengths if s in signature.example_sizes), None)


def _publish(first: Draft, second: Draft) -> None:
    """Both take their names, or what had them before stays. Raises WriteError."""
    earlier = first.path.with_name("earlier")
    with suppress(FileNotFoundError):
        try:
            os.link(first.name, earlier)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copy2(first.name, earlier)
    with telling(first.name):
        first.take_name()
    try:
        with telling(second.name):
            second.take_name()
    except BaseException:
        if earlier.exists():
            os.replace(earlier, first.name)
        else:
            first.name.unlink()
        if first.weights is not None:
            first.weights.unlink()
        raise
    first.clear()
    second.clear()
