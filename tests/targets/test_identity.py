from __future__ import annotations

import pytest
import torch

from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.errors import TargetMismatchError
from thesean.targets import get_family, rebuild


def test_the_input_comes_out_and_nothing_is_left_to_train_save_or_compute(sequence_part):
    module = build("identity", sequence_part())
    x = torch.randn(2, 5, 16)
    assert module(x) is x
    assert not list(module.parameters())
    assert not hasattr(module, "last")
    assert module.flops(sequence_part(), {"batch": 2, "time": 5}) == 0
    assert rebuild("identity", module.config())(x) is x
    assert get_family("identity").removes


def test_a_part_that_changes_its_shape_is_refused(sequence_part):
    for part in (sequence_part(width_out=5), map_part((4, 8, 8), (4, 4, 4))):
        message = (
            rf"^{part.path}: target 'identity' expected a part that keeps the shape, found .* Choose target 'linear'"
        )
        with pytest.raises(TargetMismatchError, match=message):
            build("identity", part)
