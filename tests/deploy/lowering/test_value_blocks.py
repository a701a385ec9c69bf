"""Linear attention in the widths that onnxruntime is fast at.

B batch, T time, H heads, F features, K value width
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.deploy.lowering.test_lower import assert_same, export
from thesean.deploy.lowering.value_blocks import value_blocks
from thesean.targets.shared.core import Core

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.mark.parametrize("width", [1, 2, 16, 31, 32, 33, 34, 63, 64, 65, 96, 97, 98, 128, 129, 200])
def test_blocks_cover_the_width_in_columns_that_have_a_fast_path(width):
    blocks = value_blocks(width)
    assert sum(columns for columns, _ in blocks) == width
    assert all(columns <= padded and padded in (1, 32, 64) for columns, padded in blocks)


def test_a_head_of_32_and_its_normaliser_are_two_blocks_without_padding():
    assert value_blocks(33) == [(32, 32), (1, 1)]


CORES = {
    "gated": "linear_attention",
    "gated delta": "delta_rule",
    "delta of features": "delta_rule",
    "diagonal": "diagonal_scan",
}
WIDTHS = [(16, 33), (10, 20), (64, 65), (24, 97)]  # features and values


class Heads(nn.Module):
    """One of the cores that the operator runs, once for each of WIDTHS, with the same arguments for all."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.cores = nn.ModuleList(Core(CORES[kind]) for _ in WIDTHS)

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: list[torch.Tensor] = []
        for i, core in enumerate(self.cores):
            found += self._one(core, *given[5 * i : 5 * i + 5])
        return tuple(found)

    def _one(
        self, core: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, s: torch.Tensor
    ):
        rates = (torch.sigmoid(v[..., 0]),) if "delta" in self.kind else ()
        of_each = self.kind in ("diagonal", "delta of features")
        return core(q, k, v, *rates, g.unsqueeze(-1) * (1 + k) if of_each else g, s)


def arguments(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    """Five for each of WIDTHS."""
    found: list[torch.Tensor] = []
    for features, width in WIDTHS:
        found += [
            torch.rand(batch, time, 2, features),
            torch.rand(batch, time, 2, features) / features,
            torch.randn(batch, time, 2, width),
            -torch.rand(batch, time, 2),
            torch.randn(batch, 2, features, width),
        ]
    return tuple(found)


@pytest.mark.parametrize("kind", [n if n == "diagonal" else pytest.param(n, marks=pytest.mark.thorough) for n in CORES])
def test_padded_features_and_values_change_nothing(kind):
    """All widths in one file."""
    torch.manual_seed(0)
    each = tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if i < 4 else {0: Dim.DYNAMIC} for i in range(5))
    module = Heads(kind).eval()
    proto = export(module, arguments(2, 7), (each * len(WIDTHS),))
    for batch, time in ((2, 7), (3, 19), (1, 1)):
        assert_same(proto, module, arguments(batch, time))
