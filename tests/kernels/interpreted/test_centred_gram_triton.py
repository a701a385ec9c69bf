"""The Triton kernel of the centred Gram against the float64 reference. N examples, P width"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import KERNEL_VALUE, relative_error
from thesean.kernels.centred_gram import centred_gram
from thesean.kernels.shared import grams_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3], ids=["whole", "split"])
@pytest.mark.parametrize(("n", "p"), [(7, 5), (150, 130)])
def test_it_is_that_of_the_reference(n, p, count, dtype, monkeypatch):
    monkeypatch.setattr(grams_triton, "slices", lambda *_: count)
    x_NP = (torch.randn(n, p, generator=torch.Generator().manual_seed(n)) + 50).to(dtype)
    gram_NN = centred_gram(x_NP, backend="triton")
    assert gram_NN.dtype == torch.float32
    assert torch.equal(gram_NN, gram_NN.mT)
    assert relative_error(gram_NN, centred_gram(x_NP.double())) < KERNEL_VALUE[dtype]


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match="expected bfloat16, float16, float32 for the Triton kernel, found float64"):
        centred_gram(torch.randn(8, 4, dtype=torch.float64), backend="triton")
