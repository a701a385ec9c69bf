"""Convolutional networks with fewer channels, from the model to the file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thesean
from tests.convnets import network
from tests.tolerances import relative_error
from thesean.deploy.session import Session


@pytest.mark.parametrize("name", ["basic", "plain", "inverted", "over time", "vectors"])
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
