from __future__ import annotations

import pytest
import torch
from torch import nn

from thesean.passes.graph.modes import callers_settings, evaluating, usual_settings


class Counting(nn.Module):
    """One buffer is written in place, one is assigned anew."""

    assigned: torch.Tensor
    written: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.written += 1
        self.assigned = self.assigned + 1
        return x


def test_a_guides_buffers_are_the_same_tensors_with_the_same_values_afterwards():
    guide = Counting()
    before = dict(guide.named_buffers())
    with evaluating(guide) as buffers:
        guide(torch.ones(1))
        assert sorted(buffers.changed()) == ["assigned", "written"]
    for name, buffer in guide.named_buffers():
        assert buffer is before[name]
        assert buffer.tolist() == [0, 0]


def test_tensors_are_made_as_in_a_fresh_process_whatever_the_caller_has_set():
    around = (torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16))
    for setting in around:
        with setting, usual_settings():
            made = torch.ones(2, 2, requires_grad=True)
            assert (made.device.type, made.dtype, (made @ made).dtype) == ("cpu", torch.float32, torch.float32)
            (made @ made).sum().backward()
            assert made.grad is not None


def test_settings_are_the_callers_again_afterwards_even_after_an_error():
    def failing() -> None:
        assert torch.ones(1).dtype == torch.float32
        with callers_settings():
            assert torch.ones(1).dtype == torch.float64
        raise KeyError

    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(KeyError), torch.inference_mode(), usual_settings():
            failing()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with callers_settings():
        assert torch.ones(1).dtype == torch.float32
