"""Weights in slices, in a process whose slices are all there is: steps and checkpoints are those of whole weights.

Several processes are in tests/test_ranks.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import vectors
from thesean import ranks
from thesean.distill.masters import Masters
from thesean.distill.sharded import Sharding, hold, masters_of, sharding, whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _told_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, nothing would be cut."""
    monkeypatch.setattr(ranks, "count", lambda: 2)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def held(model: nn.Module) -> list[bool]:
    sizes = [(p.untyped_storage().nbytes(), p.nbytes) for p in model.parameters()]
    assert all(size in (0, full) for size, full in sizes)
    return [size > 0 for size, _ in sizes]


class Run:
    """Steps of AdamW with clipped gradients."""

    def __init__(self, model: nn.Module, frozen: str = "") -> None:
        self.model = model
        self.weights = [p for name, p in model.named_parameters() if name != frozen]
        self.masters = masters_of(self.weights)
        self.optimizer = torch.optim.AdamW(self.masters.parameters, lr=0.05)
        self.kept = self.masters.kept(self.optimizer)

    def step(self, seed: int, most: float = 0.05) -> None:
        self.masters.clear()
        hold(self.model.parameters())
        dtype = self.weights[0].dtype
        for part in vectors(6, 4, seed=seed).to(dtype).split(3):  # gradients add up
            self.masters.backward(self.model(part).square().mean())
        assert self.masters.finish()
        self.masters.clip(most)
        self.optimizer.step()
        self.masters.write()

    def state(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.masters.state_dict(), self.kept.state_dict()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [0.05, 100.0])
def test_steps_and_checkpoints_are_those_of_whole_weights(dtype, most):
    plain, cut = network(dtype), network(dtype)
    one = Run(plain)
    assert type(one.masters) is Masters
    with sharding([cut], wanted=True):
        other = Run(cut)
        for seed in range(3):
            one.step(seed, most)
            other.step(seed, most)
        torch.testing.assert_close(other.state(), one.state(), rtol=1e-4, atol=1e-6)
        assert [p.shape for p in other.state()[0]["weights"]] == [p.shape for p in plain.parameters()]
    torch.testing.assert_close(list(cut.parameters()), list(plain.parameters()), rtol=1e-4, atol=1e-6)


def test_a_checkpoint_goes_on_in_slices_and_without():
    before = Run(network())
    before.step(0)
    states = before.state()
    wanted = [p.detach().clone() for p in before.model.parameters()]
    cut = network()
    with sharding([cut], wanted=True):
        after = Run(cut)
        after.step(5)  # so that there is something else to go back from
        with whole():
            after.masters.load_state_dict(states[0])
            after.kept.load_state_dict(states[1])
            torch.testing.assert_close([p.detach() for p in cut.parameters()], wanted)
        after.step(1)
        back = after.state()
    before.step(1)
    torch.testing.assert_close(list(cut.parameters()), list(before.model.parameters()), rtol=1e-4, atol=1e-6)
    plain = Run(network())
    plain.step(7)
    plain.masters.load_state_dict(back[0])
    plain.kept.load_state_dict(back[1])
    plain.step(2)
    before.step(2)
    torch.testing.assert_close(list(plain.model.parameters()), list(before.model.parameters()), rtol=1e-4, atol=1e-6)


def test_weights_are_there_only_while_they_are_read():
    model, before = network(), [p.detach().clone() for p in network().parameters()]
    first, _, second, bias = model.parameters()
    with sharding([model], wanted=True):
        assert held(model) == [False] * 4
        hold([first, "no tensor", None])
        assert held(model) == [True, False, False, False]
        hold([first.data.t(), bias])  # views are of their weight
        assert held(model) == [True, False, False, True]
        assert torch.equal(first, before[0])
        with whole(), torch.no_grad():
            assert held(model) == [True] * 4
            first.fill_(2.0)
            hold([])  # what is whole stays so
            assert held(model) == [True] * 4
        assert held(model) == [False] * 4
        hold(model.parameters())
        assert bool((first == 2).all())
        assert torch.equal(second, before[2])
        hold([])
    assert held(model) == [True] * 4
    assert bool((first == 2).all())
    assert all(torch.equal(p, b) for p, b in zip(list(model.parameters())[1:], before[1:], strict=True))


def test_weights_stay_whole_where_that_is_not_wanted_or_nobody_else_is_there(monkeypatch):
    model = network()
    with sharding([model], wanted=False):
        assert held(model) == [True] * 4
    monkeypatch.setattr(ranks, "count", lambda: 1)
    with sharding([model], wanted=True):
        assert held(model) == [True] * 4
        with whole():
            assert type(masters_of(list(model.parameters()))) is Masters


def test_weights_in_one_storage_are_one_slice_and_a_part_of_a_storage_is_none():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.arange(6.0).view(2, 3))
            self.b = nn.Parameter(self.a.data.view(3, 2))
            self.part = nn.Parameter(torch.zeros(8)[:4])
            self.turned = nn.Parameter(torch.zeros(2, 3).t())
            self.looked_at = nn.Parameter(torch.ones(4))

    model = Tied()
    seen = model.looked_at.detach().numpy()
    cut = Sharding([model, model])
    assert cut.of(model.a) is cut.of(model.b) is not None
    assert cut.of(model.part) is cut.of(model.turned) is None
    cut.scatter()
    assert model.a.untyped_storage().nbytes() == model.looked_at.untyped_storage().nbytes() == 0
    cut.gather()
    assert torch.equal(model.b.flatten(), torch.arange(6.0))
    assert torch.equal(model.looked_at, torch.ones(4))
    assert seen.tolist() == [1.0] * 4


def test_what_lies_in_no_slice_is_clipped_and_stepped_with_the_others():
    def tied() -> nn.Module:
        model = network()
        model[0].weight = nn.Parameter(torch.cat([model[0].weight.detach(), torch.zeros(1, 4)])[:8])
        return model

    plain, cut = tied(), tied()
    one = Run(plain)
    with sharding([cut], wanted=True):
        other = Run(cut)
        for seed in range(2):
            one.step(seed)
            other.step(seed)
        torch.testing.assert_close(other.state(), one.state(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(list(cut.parameters()), list(plain.parameters()), rtol=1e-4, atol=1e-6)


def test_an_overflow_leaves_a_step_out_and_a_closed_master_takes_no_gradients():
    model = network(torch.float16)
    with sharding([model], wanted=True):
        run = Run(model)
        hold(model.parameters())
        run.masters.backward(model(vectors(2, 4).half()).sum() * torch.inf)
        assert not run.masters.finish()
        run.masters.clear()
        run.masters.clip(1.0)  # of nothing
        run.masters.close()
        model(vectors(2, 4).half()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())  # nobody takes them on
