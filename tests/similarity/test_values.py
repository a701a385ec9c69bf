"""The measures against their textbook form, and values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from thesean.errors import DataError, UnknownNameError
from thesean.similarity import EvaluationOnlyError, get_measure, similarity


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_evaluation_measures_carry_no_gradient_and_refuse_to_be_a_loss():
    x_NP, y_NP = features(20, 4).requires_grad_(), features(20, 4, seed=1)
    for name in ("mutual-knn", "pwcca", "svcca"):
        assert not get_measure(name).differentiable
        assert not similarity(x_NP, y_NP, name).requires_grad
        with pytest.raises(EvaluationOnlyError, match=f"{name}: evaluation only, .* Train on 'cka'"):
            get_measure(name).loss(x_NP, y_NP)
    with pytest.raises(EvaluationOnlyError, match="report rank='spearman'"):
        get_measure("rsa").loss(x_NP, y_NP, rank="spearman")
    assert not similarity(x_NP, y_NP, "rsa", rank="spearman").requires_grad


@pytest.mark.parametrize("bandwidth", [0.5, 1.0])
def test_rbf_cka_is_that_of_its_paper(bandwidth):
    x_NP, y_NQ = features(21, 5), features(21, 3, seed=1)

    def kernel(z_NP: torch.Tensor) -> torch.Tensor:
        pairs = torch.pdist(z_NP)
        return torch.exp(-(torch.cdist(z_NP, z_NP) ** 2) / (2 * (bandwidth * pairs.median()) ** 2))

    centre_NN = torch.eye(21, dtype=torch.float64) - 1 / 21
    k, l = (centre_NN @ kernel(z) @ centre_NN for z in (x_NP, y_NQ))
    expected = (k * l).sum() / (k.norm() * l.norm())
    assert similarity(x_NP, y_NQ, "rbf-cka", bandwidth=bandwidth).item() == pytest.approx(expected.item(), abs=1e-10)


def test_rsa_of_three_pairs_of_distances_worked_by_hand():
    x_N1 = torch.tensor([[0.0], [1.0], [3.0], [3.0]])  # squared distances 1 9 9 4 4 0, mean 4.5
    y_N1 = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # squared distances 1 4 9 1 4 1, mean 10/3
    # sum of products 1 + 36 + 81 + 4 + 16 + 0 = 138, less 6 * 4.5 * 10/3 = 90; squares 195 - 121.5, 116 - 66.67
    assert similarity(x_N1, y_N1, "rsa").item() == pytest.approx(48 / math.sqrt(73.5 * (116 - 600 / 9)), abs=1e-6)
    # ranks 2 5.5 5.5 3.5 3.5 1 and 2 4.5 6 2 4.5 2, mean 3.5 each
    products = 2 * 2 + 5.5 * 4.5 + 5.5 * 6 + 3.5 * 2 + 3.5 * 4.5 + 1 * 2 - 73.5
    squares = (4 + 2 * 5.5**2 + 2 * 3.5**2 + 1 - 73.5) * (3 * 4 + 2 * 4.5**2 + 36 - 73.5)
    spearman = similarity(x_N1, y_N1, "rsa", rank="spearman").item()
    assert spearman == pytest.approx(products / math.sqrt(squares), abs=1e-6)


def test_rsa_by_correlation_is_that_of_corrcoef():
    x_NP, y_NQ = features(12, 6), features(12, 9, seed=1)
    pairs = torch.triu_indices(12, 12, offset=1).unbind()
    both = torch.stack([(1 - torch.corrcoef(z))[pairs] for z in (x_NP, y_NQ)])
    value = similarity(x_NP, y_NQ, "rsa", distance="correlation").item()
    assert value == pytest.approx(torch.corrcoef(both)[0, 1].item(), abs=1e-10)
    moved_NP = 3 * x_NP + torch.arange(12.0).unsqueeze(1)
    assert similarity(moved_NP, y_NQ, "rsa", distance="correlation").item() == pytest.approx(value, abs=1e-10)
    with pytest.raises(UnknownNameError, match="unknown distance 'cosine'"):
        similarity(x_NP, y_NQ, "rsa", distance="cosine")
    with pytest.raises(UnknownNameError, match="unknown rank 'kendall'"):
        similarity(x_NP, y_NQ, "rsa", rank="kendall")


@pytest.mark.parametrize("size", [(20, 5, 5), (20, 5, 9), (20, 9, 5), (6, 9, 12), (10, 12, 5), (10, 5, 12)])
def test_procrustes_is_the_nuclear_norm_for_wide_and_narrow_sides(size):
    n, p, q = size
    x_NP, y_NQ = features(n, p).requires_grad_(), features(n, q, seed=1)
    x, y = x_NP - x_NP.mean(0), y_NQ - y_NQ.mean(0)
    expected = torch.linalg.matrix_norm((x / x.norm()).mT @ (y / y.norm()), "nuc")
    assert similarity(x_NP, y_NQ, "procrustes").item() == pytest.approx(expected.item(), abs=1e-12)
    loss = get_measure("procrustes").loss
    assert loss(x_NP, y_NQ).item() == pytest.approx(1 - expected.item(), abs=1e-12)
    assert torch.autograd.gradcheck(loss, (x_NP, y_NQ))


def test_procrustes_of_a_rotation_into_more_dimensions_is_one():
    x_NP = features(20, 5).float()
    wide_NQ = 7 * x_NP @ torch.linalg.qr(features(9, 5).float()).Q.mT + 3
    assert similarity(x_NP, wide_NQ, "procrustes").item() == pytest.approx(1, abs=1e-6)
    assert 0 <= get_measure("procrustes").loss(wide_NQ, x_NP).item() < 1e-11


def test_dmnn_of_two_pairs_worked_by_hand():
    # centred: two points at -1, two at 1; cosines 1 within a pair and -1 across, so P is c / (c + 2) and 1 / (c + 2)
    x_N1 = torch.tensor([[0.0], [0.0], [2.0], [2.0]])
    y_N1 = torch.tensor([[5.0], [7.0], [5.0], [7.0]])  # other pairs
    c = math.exp(2.0)  # at temperature 1
    # mutual neighbours in units of 1 / (c + 2)^2: c^2 in the pair, 1 across; each row has one and two of them
    within, norm = 2 * c**2 + 1, c**4 + 2
    assert similarity(x_N1, x_N1 * 3 + 1, "dmnn", temperature=1.0).item() == pytest.approx(1, abs=1e-6)
    assert similarity(x_N1, y_N1, "dmnn", temperature=1.0).item() == pytest.approx(within / norm, abs=1e-6)


def test_dmnn_is_the_cosine_of_the_matrices_of_mutual_neighbours():
    x_NP, y_NQ = features(9, 4), features(9, 6, seed=1)

    def mutual(z_NP: torch.Tensor, temperature: float) -> torch.Tensor:
        unit_NP = torch.nn.functional.normalize(z_NP - z_NP.mean(0), dim=1)
        own_NN = torch.eye(9, dtype=torch.bool)
        p_NN = (unit_NP @ unit_NP.mT / temperature).masked_fill(own_NN, -torch.inf).softmax(1)
        return p_NN * p_NN.mT

    for temperature in (0.05, 0.3, 2.0):
        a, b = mutual(x_NP, temperature), mutual(y_NQ, temperature)
        expected = ((a * b).sum() / (a.norm() * b.norm())).item()
        assert similarity(x_NP, y_NQ, "dmnn", temperature=temperature).item() == pytest.approx(expected, abs=1e-12)


def test_dmnn_reads_one_between_any_two_spaces_when_all_are_neighbours():
    x_NP, y_NP = features(40, 6), features(40, 6, seed=1)
    assert similarity(x_NP, y_NP, "dmnn").item() < 0.5
    assert similarity(x_NP, y_NP, "dmnn", temperature=1e5).item() == pytest.approx(1, abs=1e-8)
    with pytest.raises(DataError, match="dmnn: temperature: expected a number above 0, found 0"):
        similarity(x_NP, y_NP, "dmnn", temperature=0)


def test_mutual_neighbours_worked_by_hand():
    # on a circle, by angle; with k = 1 the nearest of each is its pair
    def circle(*degrees: float) -> torch.Tensor:
        angle = torch.tensor(degrees) * math.pi / 180
        return torch.stack([angle.cos(), angle.sin()], 1)

    x_NP = circle(0, 10, 180, 190)
    assert similarity(x_NP, circle(90, 80, 270, 260), "mutual-knn", k=1).item() == 1.0
    assert similarity(x_NP, circle(0, 180, 10, 190), "mutual-knn", k=1).item() == 0.0
    with pytest.raises(DataError, match="expected 1 <= k < 3 for 4 examples, found k=3"):
        similarity(x_NP, x_NP, "mutual-knn", k=3)


def test_canonical_correlations_are_blind_to_linear_maps_and_find_the_shared_direction():
    shared_N1 = features(200, 1)
    x_NP = torch.cat([shared_N1, features(200, 1, seed=1)], 1)
    y_NP = torch.cat([shared_N1, features(200, 1, seed=2)], 1)
    x, y = (z - z.mean(0) for z in (x_NP, y_NP))
    # the textbook's generalised eigenvalue problem
    inverse = torch.linalg.inv(x.mT @ x) @ (x.mT @ y) @ torch.linalg.inv(y.mT @ y) @ (y.mT @ x)
    rho = torch.linalg.eigvals(inverse).real.clamp(0, 1).sqrt()
    assert rho.max().item() == pytest.approx(1, abs=1e-9)
    value = similarity(x_NP, y_NP, "svcca", variance=1.0).item()
    assert value == pytest.approx(rho.mean().item(), abs=1e-9)
    mixed_NP = y_NP @ torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=torch.float64)
    assert similarity(x_NP, mixed_NP, "svcca", variance=1.0).item() == pytest.approx(value, abs=1e-9)
    expected = similarity(x_NP, y_NP, "pwcca").item()
    assert similarity(x_NP, mixed_NP, "pwcca").item() == pytest.approx(expected, abs=1e-9)
    # the shared direction given more of x's variance weighs more
    louder_NP = x_NP * torch.tensor([10.0, 1.0], dtype=torch.float64)
    assert similarity(louder_NP, y_NP, "pwcca").item() > expected > value - 0.1


def test_svcca_drops_the_directions_without_variance_and_refuses_too_few_examples():
    x_NP = torch.cat([features(100, 2), 1e-3 * features(100, 30, seed=1)], 1)
    y_NP = torch.cat([x_NP[:, :2], 1e-3 * features(100, 30, seed=2)], 1)
    assert similarity(x_NP, y_NP, "svcca").item() == pytest.approx(1, abs=1e-4)
    assert similarity(x_NP, y_NP, "svcca", variance=1.0).item() < 0.7
    with pytest.raises(DataError, match="svcca: x has 7 directions and 8 examples, so all correlations are 1"):
        similarity(features(8, 20), features(8, 20), "svcca", variance=1.0)
    with pytest.raises(DataError, match="expected 0 < variance <= 1, found 99"):
        similarity(x_NP, y_NP, "svcca", variance=99)


def test_divergences_of_a_coin_worked_by_hand():
    y_NV = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log() + 5
    x_NV = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log() - 3
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert similarity(x_NV, y_NV, "kl").item() == pytest.approx(first / 2, abs=1e-6)
    m = (0.7, 0.3)
    to_p = 0.9 * math.log(0.9 / m[0]) + 0.1 * math.log(0.1 / m[1])
    to_q = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    assert similarity(x_NV, y_NV, "js").item() == pytest.approx((to_p + to_q) / 4, abs=1e-6)
    assert similarity(y_NV, x_NV, "js").item() == pytest.approx((to_p + to_q) / 4, abs=1e-6)


def test_divergences_of_certainties_neither_overflow_nor_exceed_their_bound():
    y_NV = torch.tensor([[400.0, 0.0, -400.0]]).requires_grad_()
    x_NV = torch.tensor([[-400.0, 0.0, 400.0]]).requires_grad_()
    assert similarity(x_NV, y_NV, "kl").item() == pytest.approx(800, rel=1e-6)
    assert similarity(x_NV, y_NV, "js").item() == pytest.approx(math.log(2), abs=1e-6)
    (similarity(x_NV, y_NV, "kl") + similarity(x_NV, y_NV, "js")).backward()
    assert x_NV.grad is not None
    assert x_NV.grad.isfinite().all()


def test_the_gradient_of_kl_is_the_difference_of_the_distributions():
    x_NV, y_NV = features(6, 5).requires_grad_(), features(6, 5, seed=1)
    get_measure("kl").loss(x_NV, y_NV, temperature=2.0).backward()
    expected = ((x_NV / 2).softmax(1) - (y_NV / 2).softmax(1)) / 2 / 6
    assert torch.allclose(x_NV.grad, expected, atol=1e-12)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="kl: temperature: expected a number above 0, found -1"):
        similarity(x_NV, y_NV, "kl", temperature=-1)


def test_a_guide_prepared_with_other_options_is_refused():
    measure, x_NP, y_NP = get_measure("rbf-cka"), features(12, 4), features(12, 4, seed=1)
    guide = measure.prepare(y_NP, bandwidth=0.5)
    expected = measure.value(x_NP, y_NP, bandwidth=0.5).item()
    assert measure.value(x_NP, guide, bandwidth=0.5).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(DataError, match=r"prepared with {'bandwidth': 0.5}, and is used with {'bandwidth': 1.0}"):
        measure.value(x_NP, guide)
