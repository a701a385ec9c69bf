"""The ONNX functions of attention with a cache against the kernel, in onnxruntime.

B batch, T new steps, P remembered steps, H heads, G heads of keys and values, K head width
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import fx

from thesean.deploy.lowering.lower import lower_cells
from thesean.deploy.lowering.to_onnx import to_onnx
from thesean.errors import ExportError
from thesean.kernels.cached_attention import cached_attention
from thesean.passes.graph.signature import InputSpec
from thesean.targets.shared.core import Core

HEADS, WIDTH, VALUES = 4, 3, 5
NAMES = ("query", "key", "value", "bias", "past_key", "past_value", "sink")


def shapes(groups: int, batch: Any, time: Any, past: Any, every: Any) -> list[tuple[Any, ...]]:
    return [
        (batch, HEADS, time, WIDTH), (batch, groups, time, WIDTH), (batch, groups, time, VALUES),
        (batch, 1, time, every), (batch, groups, past, WIDTH), (batch, groups, past, VALUES), (HEADS,),
    ]  # fmt: skip


def inputs(groups: int, batch: int, time: int, past: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(time + past)
    made = [torch.randn(shape, generator=g) for shape in shapes(groups, batch, time, past, past + time)]
    made[3] = torch.zeros_like(made[3]).masked_fill(torch.ones(time, past + time).bool().triu(past + 1), -1e9)
    return dict(zip(NAMES, made, strict=True))


def core(
    groups: int, cap: float | None, window: int | None, sunk: bool = False
) -> tuple[fx.GraphModule, tuple[InputSpec, ...]]:
    graph = fx.Graph()
    read = tuple(graph.placeholder(name) for name in NAMES)
    call = graph.call_module("core", read if sunk else read[:-1])
    graph.output(tuple(graph.call_function(lambda x, i: x[i], (call, i)) for i in range(3)))
    module = fx.GraphModule({"core": Core("cached_attention", cap=cap, window=window)}, graph)
    module.eval()
    specs = zip(NAMES, shapes(groups, "batch", "time", "past", "every"), strict=True)
    return module, tuple(InputSpec(name=n, dtype=torch.float32, shape=s) for n, s in specs)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("cap", "window", "sunk"),
    [(None, None, False), (2.0, None, False), (None, 4, True), (0.5, 1, False), (None, None, True)],
)
def test_onnxruntime_computes_what_the_kernel_does_at_any_length(groups, cap, window, sunk):
    module, specs = core(groups, cap, window, sunk)
    proto = ir.to_proto(to_onnx(module, inputs(groups, 2, 7, 3), specs, ("mixed", "next_key", "next_value"), 20))
    (function,) = proto.functions
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, time, past in ((1, 1, 0), (3, 1, 9), (2, 6, 0), (2, 5, 4)):
        given = inputs(groups, batch, time, past)
        found = session.run(None, {n: v.numpy() for n, v in given.items()})
        if not sunk:
            del given["sink"]
        for got, want in zip(found, cached_attention(*given.values(), cap=cap, window=window), strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)
    given_kinds = (("Grouped", groups != 4), ("Capped", cap), ("Window", window), ("Sink", sunk))
    kinds = [kind for kind, there in given_kinds if there]
    assert function.name == "".join(["CachedAttention", *kinds])


def test_a_core_that_was_lowered_does_not_run_outside_of_an_export():
    lowered = lower_cells(core(4, None, None)[0])
    with pytest.raises(ExportError, match="ran outside an export"):
        lowered(*inputs(4, 2, 7, 3).values())
