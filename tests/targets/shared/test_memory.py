from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from thesean.targets.shared.memory import decay_bias, later, span, spread


def test_memories_are_spread_by_a_factor_from_the_first_to_the_last():
    assert spread((1.0, 1000.0), 4).tolist() == pytest.approx([1, 10, 100, 1000])
    assert spread((8.0, 2.0), 3).tolist() == pytest.approx([8, 4, 2])
    assert spread((5.0, 50.0), 1).tolist() == pytest.approx([5])


def test_so_many_tokens_forget_by_e():
    tokens_N = torch.tensor([0.5, 3.0, 400.0])
    torch.testing.assert_close((-F.softplus(decay_bias(tokens_N)) * tokens_N).exp(), torch.full((3,), torch.e**-1))


def test_who_waits_remembers_as_much_longer():
    assert later((2.0, 30.0), 3) == (5.0, 33.0)
    assert span([2, 30]) == (2.0, 30.0)
    assert all(type(t) is float for t in span([2, 30]))
