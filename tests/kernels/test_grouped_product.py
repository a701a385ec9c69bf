"""y_s = x_s W_g for the group g that row s is in. S rows, G groups, K width of a row, N width of a result"""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import VALUE, relative_error
from thesean.kernels.grouped_product import grouped_product


def test_four_rows_worked_by_hand():
    """One of the first group, none of the second, two of the third, and one that is in none."""
    x_SK = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y_SN = grouped_product(x_SK, torch.tensor([[[10.0]], [[100.0]], [[1000.0]]]), torch.tensor([1, 1, 3]))
    assert y_SN.flatten().tolist() == [10.0, 2000.0, 3000.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 40])
def test_it_is_a_product_a_group_however_the_rows_are_divided(rows, dtype):
    g = torch.Generator().manual_seed(rows)
    weight_GKN = torch.randn(6, 3, 4, generator=g, dtype=torch.float64).to(dtype)
    x_SK = torch.randn(rows, 3, generator=g, dtype=torch.float64).to(dtype)
    divided = [torch.randint(0, rows + 1, (6,), generator=g).sort().values for _ in range(8)]
    for ends_G in (*divided, torch.full((6,), rows), torch.tensor([0, 0, 0, 0, 0, rows]), torch.zeros(6).long()):
        y_SN = grouped_product(x_SK, weight_GKN, ends_G.int())
        expected = torch.zeros(rows, 4, dtype=torch.float64)
        start = 0
        for group, end in enumerate(ends_G.tolist()):
            expected[start:end] = x_SK[start:end].double() @ weight_GKN[group].double()
            start = end
        assert y_SN.dtype == dtype
        assert y_SN.shape == expected.shape
        assert rows == 0 or relative_error(y_SN, expected) < VALUE[dtype]


def test_gradients_are_those_of_the_products():
    g = torch.Generator().manual_seed(0)
    x_SK = torch.randn(5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weight_GKN = torch.randn(3, 2, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_product(x, w, torch.tensor([2, 2, 4])), (x_SK, weight_GKN))
