"""B batch, T time, D width"""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

from tests.models import vectors
from thesean.passes.graph.lean_trace import lean_trace
from thesean.passes.graph.text import text


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.map(self.norm(x_BTD)).flatten(1).unflatten(1, (-1, 8)).relu()


def traced(free: int) -> fx.GraphModule:
    dims = (dict.fromkeys(range(free), Dim.DYNAMIC),)
    program = torch.export.export(Block().eval(), (vectors(3, 7, 8),), dynamic_shapes=dims, strict=False)
    return program.graph_module


def shapes(graph_module: fx.GraphModule) -> list[str]:
    return [str(getattr(n.meta.get("val"), "shape", None)) for n in graph_module.graph.nodes]


@pytest.mark.parametrize("free", [0, 1, 2])
def test_the_graph_is_the_same_without_stack_traces(free):
    plain = traced(free)
    with lean_trace(free):
        lean = traced(free)
    assert text(lean.graph) == text(plain.graph)
    assert shapes(lean) == shapes(plain)
    assert any(n.stack_trace for n in plain.graph.nodes)
    assert not any(n.stack_trace for n in lean.graph.nodes)


def test_torchs_settings_are_back_after_an_error():
    def settings() -> tuple[bool, bool]:
        return fx.config.do_not_emit_stack_traces, torch._dynamo.config.fake_tensor_cache_enabled

    def interrupted() -> None:
        with lean_trace(2):
            assert settings() == (True, False)
            raise KeyboardInterrupt

    before = settings()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert settings() == before
