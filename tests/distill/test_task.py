from __future__ import annotations

import pytest
import torch

from tests.models import vectors
from thesean.distill.task import primary
from thesean.errors import DataError


def test_the_primary_output_is_logits_or_the_first_floating_tensor():
    x, ids = vectors(2, 3), torch.ones(2, dtype=torch.long)
    assert primary({"hidden": vectors(2, 4), "logits": x}) is x
    assert primary((ids, [x])) is x
    assert primary(x) is x


@pytest.mark.parametrize("output", [torch.ones(2, dtype=torch.long), (), {"a": None}, torch.tensor(1.0)])
def test_an_output_with_nothing_to_match_is_refused(output):
    with pytest.raises(DataError, match="no floating-point tensor"):
        primary(output)
