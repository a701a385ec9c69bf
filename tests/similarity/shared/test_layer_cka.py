"""All pairs of layers at once against one pair at a time."""

from __future__ import annotations

import pytest
import torch

from thesean.similarity import accumulate, similarity
from thesean.similarity.shared.hsic import u_centred
from thesean.similarity.shared.layer_cka import LayerCKA, layer_cka


def layers(count: int, n: int = 60, offset: float = 0.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(count)
    shared = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return [
        shared @ torch.randn(8, 20 + i, generator=g) + i * torch.randn(n, 20 + i, generator=g) + offset
        for i in range(count)
    ]


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_each_entry_is_the_debiased_cka_of_its_pair(offset):
    a, b = layers(3, offset=offset), layers(4, offset=offset)
    matrix_LM = layer_cka(a, b)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            expected = similarity(x.double(), y.double(), "cka-debiased").item()
            assert matrix_LM[i, j].item() == pytest.approx(expected, abs=1e-6)


def test_batches_add_up_as_they_do_for_one_pair():
    a, b = layers(2), layers(3)
    running, pair = LayerCKA(), accumulate("cka-debiased")
    for rows in (slice(0, 40), slice(40, 60)):
        running.add([u_centred(x[rows]) for x in a], [u_centred(y[rows]) for y in b])
        pair.update(a[1][rows], b[2][rows])
    assert running.matrix()[1, 2].item() == pytest.approx(pair.compute().item(), abs=1e-6)


def test_a_layer_that_does_not_vary_has_no_similarity_and_spoils_no_other():
    a = [torch.full((20, 3), 300.1), *layers(1, n=20)]
    matrix_LM = layer_cka(a, a)
    assert matrix_LM[0].isnan().all()
    assert matrix_LM[1, 1].item() == pytest.approx(1, abs=1e-6)


def test_layers_of_different_precision_compare():
    a, b = layers(2), [x.double() for x in layers(2)]
    assert torch.allclose(layer_cka(a, b), layer_cka(a, a), atol=1e-6)
