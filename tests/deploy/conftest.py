"""Hybrids and where their files go.

B batch, T time
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

Converted = tuple[fx.GraphModule, Captured]


@pytest.fixture(scope="package")
def convert() -> Callable[..., Converted]:
    def make(guide: nn.Module, inputs: dict[str, torch.Tensor], target: Any, count: int | None = None) -> Converted:
        captured = capture(guide, inputs)
        torch.manual_seed(0)
        return build_hybrid(make_plan(captured, target), count).graph_module.eval(), captured

    return make
