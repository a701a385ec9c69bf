from __future__ import annotations

import torch
from torch import nn

from tests.captured import traced
from tests.models import vectors
from tests.passes.contract import Example
from thesean.passes.capture.capture import capture
from thesean.passes.graph.text import text
from thesean.passes.rejoin_norms import RejoinNorms


class Apart(nn.Module):
    """As a graph has it once torch made it free of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.copy_(torch.tensor([0.5, -0.5, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm
        y, *_ = torch.ops.aten._native_batch_norm_legit_no_training(
            x, n.weight, n.bias, n.running_mean, n.running_var, 0.1, 1e-3
        )
        return y


def example() -> Example:
    return Example(RejoinNorms(), traced(Apart().eval(), vectors(2, 3)), [vectors(2, 3, seed=1)])


def test_a_norm_in_pieces_is_one_operator_again():
    result = RejoinNorms()(traced(Apart().eval(), vectors(2, 3)))
    (line,) = [line for line in text(result.graph_module.graph) if "_norm." in line]
    tensors = "x, norm_weight, norm_bias, norm_running_mean, norm_running_var"
    assert line == f"getitem = aten.batch_norm.default({tensors}, False, 0.1, 0.001, True)"


def test_a_graph_without_a_norm_in_pieces_is_left_alone():
    result = RejoinNorms()(traced(nn.BatchNorm1d(3).eval(), vectors(2, 3)))
    assert (result.modified, result.reason) == (False, "no norm is in pieces")


class WritesIntoAView(nn.Module):
    """Torch has to follow the write, and takes the norm apart as it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y[:, 0].mul_(2.0)
        return y.mean((2, 3))


def test_a_guide_that_writes_into_a_view_keeps_its_norms():
    guide, x = WritesIntoAView().eval(), vectors(2, 3, 8, 8)
    graph_module = capture(guide, x).graph_module
    assert torch.ops.aten.batch_norm.default in {n.target for n in graph_module.graph.nodes}
    torch.testing.assert_close(graph_module(x=x), guide(x))
