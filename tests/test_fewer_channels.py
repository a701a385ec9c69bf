"""Convolutional networks with fewer channels, from the model to the file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests.convnets import Gated, network
from tests.tolerances import relative_error
from thesean.deploy.session import Session


@pytest.mark.parametrize(
    "name", ["basic", "plain", "inverted", "over time", "vectors", "gated", "gated map", "shuffled", "mixed"]
)
def test_a_convnet_loses_channels_and_is_served(name, tmp_path):
    model, shape = network(name)
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(16, *shape, generator=generator) for _ in range(6)]
    settings: dict[str, Any] = {"data": data[:5], "eval_data": data[5:], "recipe": "fast", "progress": False}
    whole, fewer = (thesean.compile(model, thesean.Target("narrow", ratio=r), **settings) for r in (1.0, 0.5))
    assert relative_error(whole(data[5]), model(data[5])) < 1e-4
    assert fewer.plan.new_flops < 0.8 * fewer.plan.flops
    # a guide that was never trained has no channels to spare
    assert relative_error(fewer(data[5]), model(data[5])) < 0.7
    fewer.save(tmp_path / "kept")
    torch.testing.assert_close(thesean.load(tmp_path / "kept")(data[5]), fewer(data[5]))
    fewer.export(tmp_path / "kept.onnx")
    given = "input" if name in ("plain", "vectors") else "x"  # as the forward names it
    outputs, _ = Session(tmp_path / "kept.onnx").run({given: data[5].numpy()})
    torch.testing.assert_close(torch.as_tensor(outputs["output"]), fewer(data[5]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["basic", "plain", "vectors"])
def test_auto_takes_channels(name):
    model, shape = network(name)
    data = [torch.randn(16, *shape) for _ in range(4)]
    whole = thesean.plan(model, "keep", data=data)
    plan = thesean.plan(model, "auto", data=data, constraints={"flops": int(0.8 * whole.flops)}, progress=False)
    assert "narrow" in {p.target for p in plan.parts}
    assert plan.new_flops <= 0.8 * whole.flops


class Conformer(nn.Module):
    """Attention, a convolution that is gated, and an MLP, each beside the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.convolution = Gated(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        y = self.norm(x_BTC)
        x_BTC = x_BTC + self.attention(y, y, y, need_weights=False)[0]
        x_BTC = self.convolution(x_BTC)
        return x_BTC + self.mlp(x_BTC)


def test_in_one_block_convolutions_lose_channels_and_mlps_neurons():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), Conformer(16), Conformer(16), nn.Linear(16, 3)).eval()
    data = [torch.randn(4, 20, 4) for _ in range(4)]
    converted = thesean.compile(model, "narrow", data=data, recipe="fast", progress=False)
    for part in converted.plan.parts:
        assert [path.split(".")[1] for path in part.replaces] == ["convolution", "mlp"]
        assert part.new_params < 0.7 * part.params
    assert relative_error(converted(data[0]), model(data[0])) < 0.5
