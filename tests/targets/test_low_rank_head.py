"""B batch, T time, D width, V outputs, R rank"""

from __future__ import annotations

import pytest
import torch

import thesean
from tests import models
from tests.targets.build import build
from tests.tolerances import relative_error
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import Target


def head(seed: int = 0) -> tuple[torch.nn.Linear, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A head, and what it makes of activations of unlike size in each direction, with a mean of their own."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(16, 40).requires_grad_(False)
    mix_DD = torch.randn(16, 16) * torch.linspace(1, 0.05, 16)
    inputs = [torch.randn(4, 12, 16) @ mix_DD.T + 5 for _ in range(4)]
    return linear, [(x, linear(x)) for x in inputs]


@pytest.fixture
def part(sequence_part):
    return sequence_part("none", width_out=40)


def test_the_full_rank_is_the_head(part):
    _, examples = head()
    module = build("low-rank-head", part, rank=16).eval()
    module.prepare(part, examples)
    for x_BTD, y_BTV in examples:
        assert relative_error(module(x_BTD), y_BTV) < 1e-5


def test_each_rank_is_the_nearest_on_the_activations(part):
    _, examples = head()
    x_BTD, y_BTV = (torch.cat(each) for each in zip(*examples, strict=True))
    left_V = torch.linalg.svdvals((y_BTV - y_BTV.mean((0, 1))).flatten(0, 1))  # a linear head: of y alone
    for rank in (3, 8):
        module = build("low-rank-head", part, rank=rank).eval()
        module.prepare(part, examples)
        found = (module(x_BTD) - y_BTV).square().sum()
        torch.testing.assert_close(found, left_V[rank:].square().sum(), rtol=1e-3, atol=1e-5)


def test_directions_that_never_occur_are_left_out(part):
    linear, _ = head()
    x_BTD = torch.randn(4, 12, 5) @ torch.randn(5, 16)
    module = build("low-rank-head", part, rank=8).eval()
    module.prepare(part, [(x_BTD, linear(x_BTD))])
    assert relative_error(module(x_BTD), linear(x_BTD)) < 1e-5


def test_half_of_the_narrower_width_is_the_default(part, sequence_part):
    assert build("low-rank-head", part).config() == {"width_in": 16, "width_out": 40, "rank": 8}
    assert build("low-rank-head", sequence_part("none", width_out=6)).config()["rank"] == 3


def test_what_mixes_steps_and_too_wide_a_rank_are_refused(part, sequence_part):
    with pytest.raises(TargetMismatchError, match="found one that mixes steps"):
        build("low-rank-head", sequence_part("causal"))
    with pytest.raises(TargetMismatchError, match=r"at most 16, .*, found rank=17\. Set rank=16"):
        build("low-rank-head", part, rank=17)


def test_not_a_number_in_the_data_names_the_part(part):
    x_BTD = torch.full((1, 4, 16), float("nan"))
    with pytest.raises(NumericalError, match=r"^layers.0: can't solve a rank, activations are not finite"):
        build("low-rank-head", part).prepare(part, [(x_BTD, torch.zeros(1, 4, 40))])


def test_a_language_models_head_is_a_part():
    guide = models.llama(layers=1)
    data = [{"input_ids": models.tokens(4, 24, seed=seed)} for seed in range(4)]
    target = Target("low-rank-head", rank=min(models.VOCABULARY, 32))
    converted = thesean.compile(guide, target, parts=["lm_head"], data=data, recipe="fast", progress=False)
    ids = models.tokens(2, 24, seed=9)
    assert relative_error(converted(input_ids=ids)["logits"], guide(input_ids=ids).logits) < 1e-4
