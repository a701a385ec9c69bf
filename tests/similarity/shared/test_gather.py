"""Two processes, one measure. N examples, P width"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from tests.tolerances import relative_error
from thesean.errors import DataError
from thesean.similarity import similarity

pytestmark = pytest.mark.thorough

CASES = ["cka", "cka-debiased", "dmnn", "rsa", "procrustes"]
SHARES = (20, 13)  # examples of each process


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(33, 6, generator=g), torch.randn(33, 9, generator=g), torch.randn(6, 8, generator=g)


def run(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    inputs_NP, y_NQ, weight = (t.split(list(SHARES))[rank] if len(t) == 33 else t for t in data())
    results = {}
    for name in CASES:
        weight = weight.detach().requires_grad_()
        x_NP = (inputs_NP @ weight).tanh()
        x_NP.retain_grad()
        value = similarity(x_NP, y_NQ, name, gather=True)
        value.backward()
        assert x_NP.grad is not None
        assert weight.grad is not None
        distributed.all_reduce(weight.grad)
        results[name] = (value.detach(), x_NP.grad, weight.grad)
    mask_N = torch.arange(SHARES[rank]) % 2 == 0
    masked = similarity((inputs_NP @ weight).tanh().detach(), y_NQ, gather=True, mask=mask_N)
    try:
        similarity(torch.randn(5, 3 + rank), torch.randn(5, 3), gather=True)
        refusal = "none"
    except DataError as error:
        refusal = str(error)
    torch.save((results, masked, refusal), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(run, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_value_and_the_gradients_of_one(ranks, name):
    inputs_NP, y_NQ, weight = data()
    weight.requires_grad_()
    x_NP = (inputs_NP @ weight).tanh()
    x_NP.retain_grad()
    expected = similarity(x_NP, y_NQ, name)
    expected.backward()
    found = [results[name] for results, _, _ in ranks]
    for value, _, weight_grad in found:
        assert abs(value.item() - expected.item()) < 1e-5
        assert relative_error(weight_grad, weight.grad) < 1e-5
    assert relative_error(torch.cat([grad for _, grad, _ in found]), x_NP.grad) < 1e-5


def test_each_process_may_mask_as_many_rows_as_it_likes(ranks):
    inputs_NP, y_NQ, weight = data()
    mask_N = torch.cat([torch.arange(n) % 2 == 0 for n in SHARES])
    expected = similarity((inputs_NP @ weight).tanh(), y_NQ, mask=mask_N)
    assert all(abs(masked.item() - expected.item()) < 1e-5 for _, masked, _ in ranks)


def test_widths_that_differ_between_processes_are_refused_in_both(ranks):
    assert all("expected one width in all processes, found [3, 4] by rank" in refusal for _, _, refusal in ranks)


def test_without_a_process_group_gathering_changes_nothing():
    inputs_NP, y_NQ, _ = data()
    assert torch.equal(similarity(inputs_NP, y_NQ, gather=True), similarity(inputs_NP, y_NQ))
