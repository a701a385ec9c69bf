"""B batch, V classes"""

from __future__ import annotations

import math

import pytest
import torch

from tests.models import vectors
from thesean.distill.task import match_loss, output_kind, primary
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


def test_logits_are_told_by_name_or_by_labels():
    x = vectors(2, 3)
    assert output_kind({"logits": x}, has_class_labels=False) == "logits"
    assert output_kind(x, has_class_labels=True) == "logits"
    assert output_kind(x, has_class_labels=False) == "features"
    assert output_kind(vectors(2, 1), has_class_labels=True) == "features"


def test_distillation_of_equal_outputs_is_zero():
    x = vectors(4, 3)
    assert match_loss(x, x, "logits").item() == pytest.approx(0, abs=1e-6)
    assert match_loss(x, x, "features").item() == 0


def test_divergence_has_the_value_worked_by_hand():
    guide, own = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert match_loss(own, guide, "logits").item() == pytest.approx(expected, rel=1e-5)


def test_a_temperature_scales_logits_and_gradients_back():
    own, guide = vectors(4, 3), vectors(4, 3, seed=1)
    hot = match_loss(own, guide, "logits", temperature=2.0)
    assert hot.item() == pytest.approx(4 * match_loss(own / 2, guide / 2, "logits").item(), rel=1e-5)


def test_positions_are_averaged():
    own, guide = vectors(4, 3), vectors(4, 3, seed=1)
    assert match_loss(own.view(2, 2, 3), guide.view(2, 2, 3), "logits").item() == pytest.approx(
        match_loss(own, guide, "logits").item(), rel=1e-6
    )


def test_features_are_compared_in_units_of_the_guides_spread():
    guide = vectors(64, 3)
    mean = guide.mean(0, keepdim=True).expand_as(guide)
    assert match_loss(mean, guide, "features").item() == pytest.approx(1, rel=1e-5)
    own = vectors(64, 3, seed=1)
    scaled = match_loss(own * 10, guide * 10, "features")
    assert scaled.item() == pytest.approx(match_loss(own, guide, "features").item(), rel=1e-5)


def test_every_output_tensor_counts():
    a, b = vectors(8, 3), vectors(8, 2, seed=1)
    off = match_loss({"a": a, "b": (b + 1,)}, {"a": a, "b": (b,)}, "features")
    alone = match_loss(b + 1, b, "features")
    assert off.item() == pytest.approx(alone.item() / 2, rel=1e-5)


def test_a_constant_guide_gives_a_finite_loss():
    assert math.isfinite(match_loss(vectors(4, 3), torch.ones(4, 3), "features").item())
