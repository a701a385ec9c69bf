"""Softmax over the last tokens and the first few.

B batch, T time, D width
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import thesean
from tests import models
from tests.targets.build import build
from thesean.deploy.session import Session
from thesean.errors import TargetMismatchError
from thesean.targets import PartFacts, Target
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.head_norm import HeadNorm
from thesean.targets.shared.rotation import Rotation


def copied(part: PartFacts, **options: Any) -> Any:
    module = build("sliding", part, **options).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output")
    return module


@pytest.mark.parametrize(("sinks", "first"), [(0, ""), (3, " and the first 3")])
def test_a_plan_tells_what_is_seen(sinks, first, sequence_part, attention_facts):
    module = build(
        "sliding", sequence_part(attention=dataclasses.replace(attention_facts(), plain=True)), window=5, sinks=sinks
    )
    assert module.kept().startswith(f"the last 5 tokens{first} keep their softmax, older ones are not seen")


@pytest.fixture(params=[False, True], ids=["plain", "turned and normed"])
def part(request, sequence_part, attention_facts) -> PartFacts:
    facts = dataclasses.replace(attention_facts(), plain=True)
    if request.param:
        norms = tuple(HeadNorm(torch.rand(4) + 0.5, 1e-6) for _ in range(2))
        rotation = Rotation((0, 1), (2, 3), (1.0, 0.1))
        facts = dataclasses.replace(facts, rotation=rotation, norms=norms)
    return sequence_part(attention=facts)


def seen(part: PartFacts, x_BTD: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """The definition: the guide's scores with a mask."""
    facts = part.attention
    assert facts is not None
    query, key, value = (a.of(x_BTD).unflatten(-1, (4, 4)) for a in (facts.query, facts.key, facts.value))
    query, key = facts.met(query, key)
    scores_BHTT = facts.scale * torch.einsum("bthc,bshc->bhts", query, key)
    step_T = torch.arange(x_BTD.shape[1])
    age_TT = step_T.unsqueeze(1) - step_T
    hidden_TT = (age_TT < 0) | ((age_TT >= window) & (step_T >= sinks))
    mixed = torch.einsum("bhts,bshc->bthc", scores_BHTT.masked_fill(hidden_TT, -torch.inf).softmax(-1), value)
    return facts.output.of(mixed.flatten(2))


@pytest.mark.parametrize(("window", "sinks"), [(21, 0), (30, 4), (17, 4)])
def test_what_holds_every_token_is_the_guides_attention(part, window, sinks):
    module, x_BTD = copied(part, window=window, sinks=sinks), torch.randn(2, 21, 16)
    facts = part.attention
    wanted = facts.output.of(facts.mixed_values(x_BTD, causal=True))
    torch.testing.assert_close(module(x_BTD)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (3, 2), (1, 1), (8, 4)])
@pytest.mark.parametrize("chunks", [[90], [7, 13, 70], [89, 1]])
def test_the_last_and_the_first_tokens_are_seen_and_no_other(part, window, sinks, chunks):
    module, x_BTD = copied(part, window=window, sinks=sinks), torch.randn(2, 90, 16)
    state, outputs = module.initial_state(x_BTD), []
    size = state[0].numel()
    for chunk in x_BTD.split(chunks, 1):
        y, state = module(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), seen(part, x_BTD, window, sinks), rtol=1e-4, atol=1e-5)
    assert state[0].numel() == size


def test_sinks_stay_in_half_precision(part):
    module, x_BTD = copied(part, window=3, sinks=4), torch.randn(1, 700, 16)
    found = module.bfloat16()(x_BTD.bfloat16())[0].float()
    wanted = seen(part, x_BTD, 3, 4)
    assert (found - wanted).norm() < 0.1 * wanted.norm()  # without the right sinks it is more than half


def test_a_bias_of_distance_is_refused(sequence_part, attention_facts):
    reach = Reach(torch.zeros(4, 1), torch.full((4,), -1.0))
    facts = dataclasses.replace(attention_facts(), bias=DistanceBias(reach, reach))
    with pytest.raises(TargetMismatchError, match=r"'sliding' expected positions .* found a bias of the distance"):
        build("sliding", sequence_part(attention=facts))


@pytest.mark.slow
def test_a_hybrid_is_written_with_a_state_that_does_not_grow(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    data = [{"input_ids": models.tokens(4, 24, seed=seed)} for seed in range(2)]
    target = Target("sliding", window=4, sinks=2)
    converted = thesean.compile(models.llama(layers=1), target, data=data, recipe="fast", progress=False)
    assert any("the last 4 tokens and the first 2 keep their softmax" in note for note in converted.plan.notes)
    exported = converted.export(tmp_path / "model.onnx", stateful="yes")  # compared with the whole, in chunks too
    assert exported.stateful
    file = Session(exported.path)
    shapes = [file.shape(name) for name in file.states]
    assert all(size == "batch" or isinstance(size, int) for shape in shapes for size in shape)


@pytest.mark.parametrize("name", ["sliding", "bounded-attention"])
def test_what_a_guide_s_softmax_is_not_is_said(name, sequence_part, attention_facts):
    facts = dataclasses.replace(attention_facts(), plain=False, differs="a cap on the scores")
    said = "what they hold is not met by the guide's softmax"
    for attention, told in (
        (facts, f"{said}: a cap on the scores"),
        (dataclasses.replace(facts, differs=""), f"{said}: more than was read off"),
        (dataclasses.replace(facts, plain=True, differs=""), ""),
    ):
        part = sequence_part(attention=attention)
        assert build(name, part).unlike(part) == told
