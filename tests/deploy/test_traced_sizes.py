"""What is 1 at the sizes of a trace is a constant in the file: a stride makes it of 7.

B batch
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thesean
from tests.models import seeded
from thesean.deploy.session import Session
from thesean.deploy.traced_sizes import traced_sizes
from thesean.passes.capture.capture import capture

DYNAMIC = {"x": {0: "batch", 2: "height", 3: "width"}}


class Strided(nn.Module):
    """x_BCHW -> (B, places, 5): what each place of a map is, less their mean."""

    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 5, stride, stride, padding=stride // 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.map(x).flatten(2).transpose(1, 2)
        return places - places.mean(1, keepdim=True)


def captured(stride: int, size: int):
    return capture(seeded(Strided, stride), torch.randn(2, 3, size, size), dynamic=DYNAMIC)


@pytest.mark.parametrize(("stride", "size", "wanted"), [(2, 32, 7), (16, 32, 32), (24, 64, 64)])
def test_sizes_at_which_what_grows_is_one_come_last(stride, size, wanted):
    found = captured(stride, size)
    first, *_ = traced_sizes(found.graph_module, found.signature, [(2, 7), (2, 19)])
    assert first == {"batch": 2, "height": wanted, "width": wanted}


def test_without_a_size_of_its_own_the_order_is_the_callers():
    found = capture(nn.Linear(3, 4).eval(), torch.randn(2, 3))
    assert list(traced_sizes(found.graph_module, found.signature, [(5, None), (2, None)])) == [
        {"batch": 5},
        {"batch": 2},
    ]


@pytest.mark.parametrize("size", [48, 64])
def test_a_file_of_a_strided_network_takes_pictures_of_any_size(tmp_path, size: int):
    guide, path = seeded(Strided, 24), tmp_path / "m.onnx"
    thesean.export_guide(guide, path, data=[torch.randn(4, 3, size, size)], dynamic=DYNAMIC)
    for height, width in ((size, size), (96, 72), (25, 120)):
        x = torch.randn(3, 3, height, width)
        found = Session(path).run({"x": x.numpy()})[0]["output"]
        torch.testing.assert_close(torch.from_numpy(found), guide(x), rtol=1e-4, atol=1e-5)
