"""Several batches that make a step are one of all their rows, as far as a loss is a mean over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import thesean
from tests.rank_cases import vectors


def converted(parts: int, measure: Any = "mse") -> thesean.Converted:
    """On batches of 16 rows, each in so many."""
    settings: dict[str, Any] = {"refit": False, "output": "kl", "task": 0.5}
    model, target, given = vectors(measure, loss=thesean.cross_entropy, steps=8, **settings)
    recipe = {**given["recipe"], "gradient_accumulation": parts}
    recipe["closed_form"] = {"enabled": False, "batches": 6 * parts}
    recipe["fine_tuning"] = {"learning_rate": 5e-3, "hidden": 0.0}
    train, held_out = given["data"][:6], given["data"][6:]
    data = [piece for x, y in train for piece in zip(x.chunk(parts), y.chunk(parts), strict=True)]
    given |= {"data": data, "eval_data": held_out, "recipe": recipe}
    return thesean.compile(model, target, progress=False, **given)


def test_four_batches_a_step_lead_where_one_of_their_rows_does():
    whole, parts = converted(1), converted(4)
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(parts.module.state_dict()[name], value, rtol=0, atol=1e-5)
    losses = [[loss for curve in made.report.curves for loss in curve.losses] for made in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-5)
    assert parts.report.steps == whole.report.steps
    assert not any("of each batch by itself" in note for note in parts.report.notes)


def test_of_a_similarity_that_needs_all_examples_it_is_told_what_it_was_of():
    told = converted(2, measure={"cka": 1.0, "mse": 1.0}).report.notes
    assert "cka: of each batch by itself, not of all examples of the 2 batches that make a step" in told
