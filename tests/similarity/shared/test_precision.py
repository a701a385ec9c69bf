"""The measures' other forms in float32 and half precision against float64, at offsets that cost digits."""

from __future__ import annotations

import pytest
import torch

from tests.similarity.contract import OFFSETS, correlated, near
from thesean.similarity import get_measure, similarity

OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("rsa", {"distance": "correlation"}),
    ("rsa", {"rank": "spearman"}),
    ("rbf-cka", {"bandwidth": 0.5}),
    ("dmnn", {"temperature": 0.5}),
    ("svcca", {"variance": 0.9}),
    ("mutual-knn", {"k": 3}),
    ("kl", {"temperature": 3.0}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_of_a_measure_is_within_a_hundred_thousandth_of_float64(name, options, offset, dtype):
    x_NP, y_NQ = ((z + offset).to(dtype) for z in correlated(get_measure(name)))
    value = similarity(x_NP, y_NQ, name, **options)
    assert value.dtype == torch.float32
    assert near(value, similarity(x_NP.double(), y_NQ.double(), name, **options), 1e-5)
