"""The caller's batches, or inputs like the guide's example, as what a quantised file is calibrated and judged on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from thesean.deploy.quantizing.samples import Judge, Samples
from thesean.distill.callbacks import checked_reader
from thesean.distill.data import Batches, Reading, check_readable
from thesean.distill.outputs import Outputs, read_outputs
from thesean.distill.row_tables import as_batches
from thesean.distill.task import InputsOf
from thesean.errors import DataError
from thesean.passes.graph.signature import Signature

_CALIBRATION, _HELD_OUT = 32, 8  # batches at most
_MADE_UP = 4  # batches of as many rows, where the caller gives none


def samples_of(
    data: Iterable[Any] | None,
    signature: Signature,
    device: torch.device | None = None,
    inputs: InputsOf | None = None,
) -> Samples:
    """Of `data` the last quarter is held out, of one batch the last quarter of its rows. Without data both are inputs
    like the example. `inputs`: as in `compile`. Raises DataError for batches that don't fit, and for a single row.
    """
    if data is None:
        sizes = signature.within({s: 4 if s.startswith("batch") else 16 for s in signature.symbols})
        sizes |= signature.example_sizes
        made = [signature.random_inputs(sizes, seed=10 + k) for k in range(2 * _MADE_UP)]
        told = f"{_MADE_UP} batches made of the example (data= brings better ones)"
        return Samples(calibration=made[:_MADE_UP], held_out=made[_MADE_UP:], judged=_judge, are_given=False, told=told)
    data = as_batches(data)
    check_readable(data)
    reading = Reading(inputs=checked_reader("inputs", inputs))
    batches = Batches(data, signature, device or torch.device("cpu"), reading).first(_CALIBRATION + _HELD_OUT)
    found = [x for _, x in batches]
    if len(found) == 1:
        calibration, held_out = _rows_apart(signature, found[0])
        told = "the last rows of the one batch of data"
        return Samples(calibration=[calibration], held_out=[held_out], judged=_judge, are_given=True, told=told)
    count = min(_HELD_OUT, max(1, len(found) // 4))
    told = "the last batch of data" if count == 1 else f"the last {count} batches of data"
    return Samples(calibration=found[:-count], held_out=found[-count:], judged=_judge, are_given=True, told=told)


def _rows_apart(
    signature: Signature, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    rows = signature.check(inputs).get("batch", 1)
    if rows < 2:
        raise DataError("data holds one row: nothing is left to hold out. Give at least two batches, or two rows.")
    kept = rows - max(1, rows // 4)
    last = dict(inputs)
    for spec in signature.inputs:
        for dim, size in enumerate(spec.shape):
            if size == "batch":
                last[spec.name] = last[spec.name].narrow(dim, kept, rows - kept)
    return signature.first_rows(inputs, kept), last


def _judge(observed: Sequence[Mapping[str, torch.Tensor]]) -> Judge:
    outputs: Outputs = read_outputs(observed)
    counted = {name for name, kind in outputs.kinds.items() if kind != "ignore"}
    return Judge(
        distance=lambda found, exact: float(outputs.distance(found, exact)),
        unit="nats" if outputs.in_nats else "of the variance",
        classes=tuple(name for name in counted if outputs.kinds[name] == "softmax"),
    )
