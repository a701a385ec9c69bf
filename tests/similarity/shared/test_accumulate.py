"""Batches against all examples at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import thesean
from thesean.errors import DataError, NumericalError
from thesean.similarity import accumulate, similarity
from thesean.similarity.shared.hsic import u_centred

ADDITIVE = ["mse", "nmse", "cosine", "kl", "js"]


def sides(n: int = 300, p: int = 12, q: int = 12, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(n, 4, generator=g)
    x, y = (shared @ torch.randn(4, w, generator=g) + torch.randn(n, w, generator=g) + offset for w in (p, q))
    return x, y


def batches(x: torch.Tensor, y: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("size", [300, 64, 7])
def test_measures_that_are_means_are_those_of_all_examples(name, size):
    x_NP, y_NP = sides(offset=30.0)
    running = accumulate(name)
    for x, y in batches(x_NP, y_NP, size):
        running.update(x, y)
    assert running.examples == 300
    assert running.compute().item() == pytest.approx(similarity(x_NP.double(), y_NP.double(), name).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["cka", "cka-debiased"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("size", [300, 64, 1])
def test_exact_cka_is_that_of_all_examples_whatever_the_batches(name, offset, size):
    x_NP, y_NQ = sides(q=20, offset=offset)
    running = accumulate(name, exact=True)
    for x, y in batches(x_NP, y_NQ, size):
        running.update(x, y)
    expected = similarity(x_NP.double(), y_NQ.double(), name).item()
    assert running.compute().item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_debiased_cka_of_one_batch_is_the_measure_and_of_many_is_near(offset):
    x_NP, y_NQ = sides(n=4000, q=20, offset=offset)
    whole, running = accumulate(), thesean.similarity.accumulate("cka-debiased")  # type: ignore[attr-defined]
    whole.update(x_NP[:200], y_NQ[:200])
    expected = similarity(x_NP[:200].double(), y_NQ[:200].double(), "cka-debiased").item()
    assert whole.compute().item() == pytest.approx(expected, abs=1e-6)
    for x, y in batches(x_NP, y_NQ, 32):
        running.update(x, y)
    everything = similarity(x_NP.double(), y_NQ.double(), "cka-debiased").item()
    assert running.compute().item() == pytest.approx(everything, abs=0.02)
    # what averaging the biased form over the same batches would give
    biased = torch.stack([similarity(x, y, "cka") for x, y in batches(x_NP, y_NQ, 32)]).mean().item()
    assert abs(biased - everything) > 0.05


def test_the_average_is_of_debiased_hsics_weighted_by_examples():
    x_NP, y_NQ = sides(n=30, p=5, q=6)
    running = accumulate()
    total = torch.zeros(3, dtype=torch.float64)
    for x, y in ((x_NP[:20], y_NQ[:20]), (x_NP[20:], y_NQ[20:])):
        running.update(x, y)
        n, one = x.shape[0], torch.ones(x.shape[0], dtype=torch.float64)
        grams = [z.double() @ z.double().mT for z in (x, y)]
        k, l = (gram - torch.diag(gram.diagonal()) for gram in grams)
        terms = []
        for a, b in ((k, l), (k, k), (l, l)):  # Song et al. 2012, eq. 5, as it stands
            sums = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ a @ b @ one)
            terms.append((torch.trace(a @ b) + sums) / (n * (n - 3)))
        total += n * torch.stack(terms)
    assert running.compute().item() == pytest.approx((total[0] / (total[1] * total[2]).sqrt()).item(), abs=1e-6)


def test_the_rows_of_a_u_centred_gram_add_up_to_nothing():
    u_NN = u_centred(sides(n=9)[0].double() + 300)
    assert (u_NN.sum(0).abs() < 1e-9).all()
    assert (u_NN.diagonal() == 0).all()


def test_tokens_and_masks_go_through():
    x_NP, y_NP = sides(n=24)
    mask = torch.arange(24) % 3 != 0
    running = accumulate("mse", flatten="token")
    running.update(x_NP.view(4, 6, 12), y_NP.view(4, 6, 12), mask=mask.view(4, 6))
    assert running.examples == 16
    assert running.compute().item() == pytest.approx(similarity(x_NP[mask], y_NP[mask], "mse").item(), rel=1e-6)


def test_what_batches_do_not_determine_is_refused():
    with pytest.raises(DataError, match=r"cka: its bias depends .* Use 'cka-debiased', or exact=True"):
        accumulate("cka")
    with pytest.raises(DataError, match="procrustes: the value of all examples does not follow from batches"):
        accumulate("procrustes")
    with pytest.raises(TypeError, match="no option 'temperature'"):
        accumulate("cka-debiased", temperature=1.0)
    with pytest.raises(DataError, match="nothing to compute"):
        accumulate().compute()


@pytest.mark.parametrize("exact", [False, True])
def test_a_refused_batch_leaves_no_trace(exact):
    x_NP, y_NP = sides(n=24)
    running = accumulate(exact=exact)
    running.update(x_NP, y_NP)
    before = running.compute()
    with pytest.raises(NumericalError):
        running.update(x_NP * torch.nan, y_NP)
    with pytest.raises(DataError):
        running.update(x_NP, y_NP[:20])
    assert running.examples == 24
    assert torch.equal(running.compute(), before)
