"""A conversion as a page: what can be measured with data at hand, and the file.

B batch, T time, V classes, N rows, P width
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from thesean.alike import Conversion, alike
from thesean.distill.data import Batches, labels_in
from thesean.errors import DataError
from thesean.lost import find_lost
from thesean.passes.graph.modes import evaluating, usual_settings
from thesean.passes.graph.signature import Signature
from thesean.report.answers import Answers, Decode
from thesean.report.environment import environment
from thesean.report.page.findings import Findings, Served
from thesean.report.page.page import page
from thesean.report.trade_offs import TradeOffs
from thesean.scratch import named
from thesean.write_file import write_text

_BATCHES = 8  # that are looked at
_NO_GUIDE = "The guide isn't at hand: a saved conversion doesn't hold it. What `compile` returned can compare."
_NO_DATA = "No data was given: html(path, data=batches) compares guide and converted on it."


def write_page(
    converted: Conversion,
    path: str | os.PathLike[str],
    data: Iterable[Any] | None,
    decode: Decode | None,
    onnx: str | os.PathLike[str] | None,
    trade_offs: TradeOffs | str | os.PathLike[str] | None,
    answers: Answers | None = None,
) -> Path:
    """Raises DataError, ExportError for a file that is no model, WriteError; then an earlier page stays."""
    path = named(path)
    if answers is not None and not isinstance(answers, Answers):
        raise DataError(f"answers: expected what thesean.compare_answers gave, found {answers!r:.100}.")
    if decode is not None and not callable(decode):
        raise DataError(f"decode: expected a function of tokens that gives text, found {decode!r:.100}.")
    measured = _measured(trade_offs, converted)
    served = _served(converted.signature, onnx)
    why = _NO_DATA if data is None else _NO_GUIDE if not len(converted.frontier) else ""
    findings = Findings(why=dict.fromkeys(("lost", "alike"), why), served=served)
    if not why:
        assert data is not None
        findings = _compared(converted, data, decode, served)
    findings = replace(findings, trade_offs=measured, answers=answers)
    return write_text(path, page(converted.plan, converted.report, findings, environment()))


def _measured(given: TradeOffs | str | os.PathLike[str] | None, converted: Conversion) -> TradeOffs | None:
    if given is None:
        return None
    found = given if isinstance(given, TradeOffs) else TradeOffs.from_json(given)
    if not any(point.params == converted.report.params for point in found):
        raise DataError(
            f"trade_offs: none of its networks has this one's {converted.report.params:,} parameters; it has "
            f"{', '.join(point.name for point in found)}. Give what was measured of this conversion."
        )
    return found


def _compared(converted: Conversion, data: Iterable[Any], decode: Decode | None, served: Served) -> Findings:
    guide = converted.frontier[0].module
    home = next((p.device for p in converted.module.parameters()), torch.device("cpu"))
    guide = guide.to(home)
    pairs = list(Batches(data, converted.signature, home).first(_BATCHES))
    if not pairs:
        raise DataError("data is empty: expected at least one batch.")
    batches = [inputs for _, inputs in pairs]
    labels = labels_in(pairs[0][0], len(converted.signature.inputs))
    with usual_settings(), torch.no_grad(), evaluating(guide), evaluating(converted.module):
        lost, unit, looked_at = find_lost(guide, converted.module, batches, labels, decode)
        found, why = alike(guide, converted, batches)
    return Findings(
        why={"lost": "Guide and converted give the same on all examples.", "alike": why},
        served=served,
        lost=tuple(lost),
        unit=unit,
        looked_at=looked_at,
        alike=found,
    )


def _served(signature: Signature, onnx: str | os.PathLike[str] | None) -> Served:
    sizes = signature.within(dict.fromkeys(signature.symbols, 2))
    masks = frozenset(n for n, v in signature.random_inputs(sizes).items() if v.ndim > 1 and bool((v == 1).all()))
    if onnx is None:
        inputs = tuple((i.name, _numpy(i.dtype), i.shape) for i in signature.inputs)
        return Served(file="model.onnx", inputs=inputs, states=None, masks=masks)
    from thesean.deploy.onnx_file import declared

    file = named(onnx, "read", DataError)
    inputs, states, outputs = declared(file)
    return Served(file=file.name, inputs=inputs, states=states, outputs=outputs, masks=masks)


def _numpy(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return "float32" if name == "bfloat16" else name + ("_" if name == "bool" else "")
