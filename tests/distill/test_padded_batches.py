"""What stands at padded steps takes no part in aligning, solving, training and judging.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import models
from tests.kept_captures import capture
from tests.models import tokens
from thesean.distill.outputs import Outputs
from thesean.distill.seen import Seen
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan

SHORT = 6


def batches(padded: bool, noise: int = 0, count: int = 5) -> list[dict[str, torch.Tensor]]:
    """The same sentences: six tokens and, where padded, three steps of anything behind them."""
    made = []
    for seed in range(count):
        ids_BT = tokens(8, SHORT, seed=seed)
        mask_BT = torch.ones_like(ids_BT)
        if padded:
            ids_BT = torch.cat([ids_BT, tokens(8, 3, seed=100 + noise + seed)], 1)
            mask_BT = torch.cat([mask_BT, torch.zeros_like(mask_BT[:, :3])], 1)
        made.append({"input_ids": ids_BT, "attention_mask": mask_BT})
    return made


def convert(data: list[dict[str, torch.Tensor]], target: Any, **recipe: Any) -> thesean.Converted:
    return thesean.compile(
        models.bert(), target, data=data[1:], eval_data=data[:1], recipe={"warmup": 1, **recipe}, progress=False
    )


def outputs(converted: thesean.Converted) -> torch.Tensor:
    ids = tokens(4, SHORT, seed=50)
    with torch.no_grad():
        hidden: torch.Tensor = converted(input_ids=ids, attention_mask=torch.ones_like(ids))["last_hidden_state"]
    return hidden


CLOSED = {"steps": 0, "alignment": {"schedule": "none"}}


@pytest.mark.parametrize(
    "target",
    [
        "gru",
        "narrow",
        *(
            pytest.param(t, marks=pytest.mark.thorough, id=str(t))
            for t in ("linear-attention", "reservoir", "narrow-heads", thesean.Target("mingru", scope="part"))
        ),
    ],
)
def test_the_closed_form_on_padded_sentences_is_that_on_the_sentences(target):
    alone, padded = (convert(batches(p), target, **CLOSED) for p in (False, True))
    torch.testing.assert_close(outputs(padded), outputs(alone), rtol=1e-3, atol=1e-3)
    found, expected = (c.report.converted["divergence"] for c in (padded, alone))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("schedule", [pytest.param("independent", marks=pytest.mark.thorough), "progressive"])
def test_what_stands_at_padded_steps_changes_no_step_of_training(schedule):
    recipe: dict[str, Any] = {"steps": 12, "alignment": {"schedule": schedule, "share": 0.5, "check_every": 2}}
    first, second = (convert(batches(True, noise), "gru", **recipe) for noise in (0, 50))
    torch.testing.assert_close(outputs(first), outputs(second), rtol=1e-4, atol=1e-4)
    assert first.report.converted["divergence"] == pytest.approx(second.report.converted["divergence"], rel=1e-3)


@pytest.mark.thorough
def test_candidates_of_auto_are_probed_without_padded_steps():
    plans = [
        thesean.plan(
            models.bert(layers=1), "auto", data=batches(padded)[1:], eval_data=batches(padded)[:1],
            candidates=["gru", "identity"], constraints={"params": 100_000}, progress=False,
        )
        for padded in (False, True)
    ]  # fmt: skip
    alone, padded = ([c.divergence for c in plan.candidates] for plan in plans)
    assert padded == pytest.approx(alone, rel=1e-2, abs=1e-5)


def test_an_output_is_compared_where_a_token_is():
    kinds = Outputs(kinds={"logits": "softmax"}, told="")
    own, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    found = kinds.distance({"logits": own}, {"logits": theirs}, masks={"logits": mask_BT})
    wanted = kinds.distance({"logits": own[mask_BT]}, {"logits": theirs[mask_BT]})
    assert torch.equal(found, wanted)


def test_logits_over_the_steps_themselves_leave_padded_ones_out():
    kinds = Outputs(kinds={"start_logits": "softmax"}, told="")
    own, theirs = torch.randn(1, 5), torch.randn(1, 5)
    mask_BT = torch.tensor([[True, True, True, False, False]])
    found = kinds.distance({"start_logits": own}, {"start_logits": theirs}, masks={"start_logits": mask_BT})
    wanted = kinds.distance({"start_logits": own[:, :3]}, {"start_logits": theirs[:, :3]})
    torch.testing.assert_close(found, wanted)


def test_masks_are_told_apart_by_the_steps_that_they_are_of():
    ids = tokens(2, SHORT)
    captured = capture(models.bert(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    hybrid = build_hybrid(make_plan(captured, "gru"))
    seen = Seen(captured.graph_module)
    (name,) = seen.names
    values = {name: torch.tensor([[True, False]])}
    first = hybrid.replacements[0]
    assert torch.equal(seen.of(first.guide_exit, values), values[name])  # type: ignore[arg-type]
    assert torch.equal(seen.read_by(first, values), values[name])  # type: ignore[arg-type]
    assert seen.of(first.guide_exit, {name: torch.tensor([[True, True]])}) is None  # nothing is hidden
    assert list(seen.of_outputs(values)) == ["last_hidden_state"]
    assert isinstance(hybrid.module(first), nn.Module)
