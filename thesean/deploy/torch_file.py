"""A .pt2 file: torch's own form of a graph, which torch.export.load reads without Thesean.

B batch, T time
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import fx
from torch.export import Dim
from torch.fx.experimental import _config

from thesean.deploy.export_report import ExportReport
from thesean.deploy.lowering.lower import cells_in_torch
from thesean.deploy.lowering.to_onnx import output_names, quiet
from thesean.deploy.parity import (
    IN_TORCH,
    allowed_error,
    compare_all,
    not_comparable,
    rounding,
)
from thesean.deploy.traced_sizes import of_stream, traced_sizes
from thesean.errors import ExportError, first_line
from thesean.passes.graph.signature import InputSpec, Signature
from thesean.passes.graph.stream import STREAM, delay_of
from thesean.passes.thread_state import STATE_IN, STATE_OUT, state_shape, zero_states
from thesean.write_file import new_file

logger = logging.getLogger(__name__)

SUFFIX = ".pt2"

# Sizes to trace with: those that a graph has of its own (heads, taps) would be taken for it
_TRACED = ((5, 11), (3, 7), (7, 19), (2, 67))
_REMEMBERED = 13


def write_torch(
    module: fx.GraphModule,
    lowered: fx.GraphModule,
    signature: Signature,
    path: Path,
    train_length: int | None,
    note: str,
    tolerance: float,
    asked: bool = False,
) -> ExportReport:
    """Save `lowered`, what an export makes of the frozen `module`; compare the saved file with it, whole and in chunks,
    and only then let it take its name. It takes inputs and states by name, and gives a tuple of outputs and states.

    A chunk may have any length; attentions and linear states are quadratic in it. Raises ExportError for a graph that
    torch can write for one size alone, and WriteError.
    """
    start = time.monotonic()
    states: tuple[InputSpec, ...] = lowered.meta.get("states", ())
    threaded = lowered if states else None
    stream: Signature = lowered.meta.get(STREAM, signature) if states else signature
    names = output_names(module)
    with new_file(path, parents=True) as made:

        def compared(may_be_one: bool) -> Any:
            program = _traced(lowered, module, signature, stream, states, may_be_one)
            with made.open("wb") as file, quiet():
                _save(program, file)
            loaded = _Program(torch.export.load(str(made)), stream, states, names, threaded)
            return compare_all(loaded, threaded, module, signature, names, train_length)

        try:
            checks, skipped = compared(may_be_one=False)
        except (AssertionError, RuntimeError) as error:  # torch's guards on sizes
            logger.debug("%s: traced anew, for sizes that may be one: %s", path, first_line(error))
            try:
                checks, skipped = compared(may_be_one=True)
            except (AssertionError, RuntimeError, ExportError):
                told = f"{path}: the file does not run where the module does: {first_line(error)}"
                raise ExportError(told) from error
        checks = [c._replace(label=c.label.replace("onnxruntime", "the file")) for c in checks if c.label != IN_TORCH]
        if unchecked := not_comparable(checks):
            raise ExportError(f"{path}: {unchecked}. No file was written.")
        rounding_at = partial(rounding, module, signature)
        tolerance, amplifies = allowed_error(checks, tolerance, path, rounding_at, asked=asked)
        size = made.stat().st_size
    return ExportReport(
        path=path,
        bytes=size,
        opset=0,
        stateful=bool(states),
        inputs=tuple(s.name for s in (*stream.inputs, *states)),
        outputs=(*names, *(STATE_OUT + s.name.removeprefix(STATE_IN) for s in states)),
        checks=tuple(checks),
        tolerance=tolerance,
        seconds=time.monotonic() - start,
        note="; ".join(n for n in (note, *skipped, amplifies) if n),
        delay=delay_of(lowered) if states else 0,
    )


class _Written:
    """A file that takes whatever comes and tells afterwards: torch's archive ends the process where a write fails."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failed is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.failed = error
        return len(data)


def _save(program: torch.export.ExportedProgram, file: BinaryIO) -> None:
    """Raises OSError, a full disk's for one."""
    written = _Written(file)
    torch.export.save(program, written)  # type: ignore[arg-type]
    if written.failed is not None:
        raise written.failed


def _traced(
    lowered: fx.GraphModule,
    module: fx.GraphModule,
    signature: Signature,
    stream: Signature,
    states: tuple[InputSpec, ...],
    may_be_one: bool,
) -> torch.export.ExportedProgram:
    """For all sizes that torch's guards let pass: of one that its operators compare with 1 it notes that it is another.
    With `may_be_one` nothing is compared, which some operators do not bear.
    """
    specs = (*stream.inputs, *states)
    shapes = {s.name: {d: Dim.DYNAMIC for d, n in enumerate(s.shape) if isinstance(n, str)} for s in specs}
    written, last = cells_in_torch(lowered), None
    wanted = [(batch, length if signature.lengths else None) for batch, length in _TRACED]
    for sizes in traced_sizes(module, signature, wanted):
        example = stream.random_inputs(of_stream(sizes, stream))
        for spec in states:
            shape = state_shape(spec.shape, sizes.get("batch", 1), _REMEMBERED)
            example[spec.name] = torch.zeros(shape, dtype=spec.dtype)
        try:
            with quiet(), torch.no_grad(), _config.patch(backed_size_oblivious=may_be_one):  # type: ignore[attr-defined]
                return torch.export.export(written, (), example, dynamic_shapes=shapes)
        except Exception as error:
            last = error
    if last is None:
        raise ExportError(f"the module runs at none of the sizes {_TRACED} to trace it with: write an .onnx file.")
    raise ExportError(f"torch can't write this graph for every size: {first_line(last)} Write an .onnx file.") from last


class _Program:
    """As a session of onnxruntime is called: arrays by name in and out, the state beside."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        stream: Signature,
        states: tuple[InputSpec, ...],
        names: tuple[str, ...],
        threaded: fx.GraphModule | None,
    ) -> None:
        self._module, self._stream, self._names = program.module(), stream, names
        self._states, self._threaded = tuple(s.name for s in states), threaded

    @property
    def is_stateful(self) -> bool:
        return bool(self._states)

    @torch.no_grad()
    def run(self, inputs: dict[str, np.ndarray], state: Any = None) -> tuple[dict[str, np.ndarray], Any]:
        given = {s.name: torch.from_numpy(inputs[s.name]) for s in self._stream.inputs}
        if self._threaded is not None:
            given |= zero_states(self._threaded, len(next(iter(given.values())))) if state is None else state
        found = self._module(**given)
        values = found if isinstance(found, (tuple, list)) else (found,)
        count = len(self._names)
        outputs = {n: v.numpy() for n, v in zip(self._names, values[:count], strict=True)}
        return outputs, dict(zip(self._states, values[count:], strict=True))
