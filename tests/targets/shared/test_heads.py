"""The shape of heads: the guide's where it has attention and nobody asks for others."""

from __future__ import annotations

from typing import Any

import pytest

from thesean.targets import PartFacts, get_family
from thesean.targets.shared.family import parse_options
from thesean.targets.shared.heads import head_shape


def shape(part: PartFacts, **options: Any) -> Any:
    asked: Any = parse_options(get_family("linear-attention"), options)
    return head_shape(part, asked)


@pytest.mark.parametrize(("heads", "each", "scale"), [(1, 16, 0.25), (4, 4, 0.5), (16, 1, 1.0)])
def test_heads_share_the_width_and_scores_are_scaled_by_theirs(heads, each, scale):
    part = PartFacts(path="p", input_shape=("batch", "time", 16), output_shape=("batch", "time", 16), mixing="causal",
                     params=1000)  # fmt: skip
    found = shape(part, heads=heads)
    assert found[:5] == (heads, heads, each, each, scale)
    assert found[5:] == (None,) * 4
    assert shape(part, heads=heads, kv_heads=1).kv_heads == 1
    assert shape(part, heads=heads, width=32).key_width == 2 * each
