"""What an ONNX file takes and gives, as text: inputs, outputs, states, operators, and what was seen of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from thesean.deploy.onnx_file import (
    BESIDE_DECODER,
    BESIDE_ENCODER,
    DELAY,
    GUIDE,
    OPERATORS,
    PARITY_SEEN,
    SIZES,
    STATES,
    UNCHECKED,
    UNTRIED,
    WEIGHTS,
    read,
    told_by,
)
from thesean.deploy.parity import Check, largest, untried
from thesean.deploy.quantizing.quantized import QUANTIZED, Quantized
from thesean.deploy.told import Beside, Late, StateRow, parsed, told_as
from thesean.passes.graph.signature import Bound, Origin

_OPERATORS = 12  # the most frequent; the rest are counted together


def describe_file(path: Path) -> tuple[str, dict[str, str]]:
    """Any model as text, ours or not, and its metadata; no weights beside it are read. Raises ExportError."""
    import onnx

    model = read(path)
    told = told_by(model)
    opset = next((o.version for o in model.opset_import if o.domain == ""), 0)
    maker = " ".join(w for w in (model.producer_name, model.producer_version) if w) or "an unknown maker"
    sections = [f"{path}: {_size(path, told)}, opset {opset}, {len(model.graph.node)} nodes, made by {maker}"]
    states = {row.name: row.start for row in told_as(told, STATES, tuple[StateRow, ...], ())}
    weights = {i.name for i in model.graph.initializer}
    for title, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        rows = [_row(v, states, onnx) for v in values if v.name not in weights]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        sections.append("\n".join([title, *(f"  {line}" for line in lines)]))
    late = told_as(told, DELAY, Late, Late())
    if steps := late.steps:
        sections.append(
            f"delay\n  outputs come {steps} steps late; after the last token {steps} more, {late.seen} False"
        )
    if BESIDE_ENCODER in told:
        encoder = _beside(told, BESIDE_ENCODER)
        lost = "" if encoder_of(path, told) is not None else ", which is missing"
        gives = ", ".join(encoder.gives)
        sections.append(f"encoder\n  {encoder.file}{lost}; it gives {gives}, the same in every call")
    if BESIDE_DECODER in told:
        sections.append(f"decoder\n  {_beside(told, BESIDE_DECODER).file}")
    if bounds := told_as(told, SIZES, tuple[Bound, ...], ()):
        sections.append("\n".join(["sizes", *(f"  {b.name}: {b.describe()}, no others" for b in bounds)]))
    if GUIDE in told:
        origin = told_as(told, GUIDE, Origin, Origin())
        known = [("weights", origin.weights), ("commit", origin.commit)]
        sections.append("\n".join(["guide", *(f"  {name} {value}" for name, value in known if value)]))
    written = f"\n  linear attention as {told[OPERATORS]}" if OPERATORS in told else ""
    sections.append(f"operators\n  {_operators(model)}{written}")
    if PARITY_SEEN in told:
        checks = told_as(told, PARITY_SEEN, tuple[Check, ...], ())
        unchecked = f"\n  not checked: {told[UNCHECKED]}" if UNCHECKED in told else ""
        if UNTRIED in told:
            unchecked += f"\n  {untried(told_as(told, UNTRIED, tuple[int, ...], ()))}"
        sections.append(f"parity\n  {len(checks)} checks in onnxruntime; {largest(checks)}{unchecked}")
    if QUANTIZED in told:
        sections.append(f"quantised\n{parsed(told, QUANTIZED, Quantized)}")
    return "\n\n".join(sections), told


def encoder_of(path: Path, told: dict[str, str]) -> Path | None:
    """The encoder's file beside a decoder's, where it is."""
    if BESIDE_ENCODER not in told:
        return None
    beside = path.with_name(Path(_beside(told, BESIDE_ENCODER).file).name)
    return beside if beside.is_file() else None


def _size(path: Path, told: dict[str, str]) -> str:
    inside = f"{path.stat().st_size / 1e6:.2f} MB"
    if WEIGHTS not in told:
        return inside
    beside = path.with_name(Path(told[WEIGHTS]).name)
    found = f"{beside.stat().st_size / 1e6:.2f} MB" if beside.is_file() else "missing"
    return f"{inside} and {found} of weights in {beside.name}"


def _row(value: Any, states: dict[str, str], onnx: Any) -> tuple[str, str, str, str]:
    """Name, dtype, shape, what starts it."""
    tensor = value.type.tensor_type
    shape = ", ".join(str(d.dim_param or d.dim_value) for d in tensor.shape.dim)
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    start = f"state, starts as {states[value.name]}" if value.name in states else value.doc_string
    return value.name, dtype, f"({shape})", start


def _operators(model: Any) -> str:
    counts = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    named = [f"{count} {name}" for name, count in counts.most_common(_OPERATORS)]
    others = counts.total() - sum(count for _, count in counts.most_common(_OPERATORS))
    return ", ".join([*named, *([f"{others} others"] if others else [])])


def _beside(told: dict[str, str], key: str) -> Beside:
    return told_as(told, key, Beside, Beside(file=""))
