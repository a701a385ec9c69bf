"""B batch, T time, D width, H heads, G heads of keys and values, C width of a head"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from tests.targets.build import build
from tests.tolerances import relative_error
from thesean.errors import NumericalError, TargetMismatchError
from thesean.targets import Affine, AttentionFacts, PartFacts
from thesean.targets.shared.distance_bias import DistanceBias, Reach
from thesean.targets.shared.head_metrics import moments_of
from thesean.targets.shared.head_norm import HeadNorm
from thesean.targets.shared.merge_heads import Merge
from thesean.targets.shared.rotation import Rotation

BOTH = pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
MEETING: dict[str, dict[str, Any]] = {
    "plain": {},
    "turned": {"rotation": Rotation((0, 1), (2, 3), (1.0, 0.1))},
    "turned in part": {"rotation": Rotation((0,), (2,), (1.0,))},
    "normed": {"norms": tuple(HeadNorm(torch.linspace(0.5, 2, 16).view(4, 4), eps) for eps in (1e-6, 1e-5))},
    "biased": {"bias": DistanceBias(*(Reach(torch.zeros(4, 1), -torch.arange(1.0, 5)) for _ in range(2)))},
}
KINDS = pytest.mark.parametrize("kind", MEETING)


@pytest.fixture
def make_part(sequence_part, attention_facts):
    def make(mixing="causal", kind="plain", **facts: Any) -> PartFacts:
        known = dataclasses.replace(attention_facts(**facts), plain=True, **MEETING[kind])
        return sequence_part(mixing, attention=known)

    return make


def wanted(part: PartFacts, x_BTD: torch.Tensor) -> torch.Tensor:
    facts = part.attention
    assert facts is not None
    return facts.output.of(facts.mixed_values(x_BTD, part.mixing == "causal"))


def inputs(seed: int = 1, count: int = 4) -> list[torch.Tensor]:
    """Of few directions, with a mean of its own: as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix_DD = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.05, 16)
    return [torch.randn(4, 12, 16, generator=generator) @ mix_DD.T + 0.3 for _ in range(count)]


def merged(part: PartFacts, **options: Any) -> Any:
    module = build("gqa", part, **options).eval()
    module.copy_from(part)
    module.prepare(part, [(x, x) for x in inputs()])
    return module


def error_of(module: Any, part: PartFacts) -> float:
    (x_BTD,) = inputs(seed=9, count=1)
    return relative_error(module(x_BTD), wanted(part, x_BTD))


def with_rows(affine: Affine, change: Any) -> Affine:
    weight_HCD, bias_HC = affine.weight_OI.unflatten(0, (4, 4)).clone(), affine.bias_O.view(4, 4).clone()
    change(weight_HCD, bias_HC)
    return Affine(weight_HCD.flatten(0, 1), bias_HC.flatten())


@BOTH
@KINDS
def test_as_many_heads_as_there_are_is_the_guide(mixing, kind, make_part):
    part = make_part(mixing, kind)
    module = build("gqa", part, kv_heads=4).eval()
    assert module.copy_from(part) == ("query", "key", "value", "output")
    assert error_of(module, part) < 1e-5
    assert error_of(merged(part, kv_heads=4), part) < 1e-5


def test_groups_that_the_guide_has_are_kept(make_part):
    part = make_part()
    facts = part.attention

    def share(weight_HCD, bias_HC):
        weight_HCD[1], weight_HCD[3], bias_HC[1], bias_HC[3] = weight_HCD[0], weight_HCD[2], bias_HC[0], bias_HC[2]

    facts = dataclasses.replace(facts, key=with_rows(facts.key, share), value=with_rows(facts.value, share))
    part = dataclasses.replace(part, attention=facts)
    assert facts.kv_heads == 2
    module = merged(part, kv_heads=2)
    assert error_of(module, part) < 1e-5
    assert torch.equal(module.key.weight, facts.grouped(2)[0].weight_OI)
    assert build("gqa", part).config()["kv_heads"] == 1


def alike(facts: AttentionFacts, kind: str) -> AttentionFacts:
    """Heads 0 and 2, and 1 and 3, whose keys and values are one another's, mapped as the kind allows."""
    mix_CC = torch.randn(4, 4)
    turned = {0: 2, 1: 3} if kind == "turned" else {0: 2} if kind == "turned in part" else {}

    def keys(weight_HCD, bias_HC):
        for one, other in ((0, 2), (1, 3)):
            rows_CI = torch.cat([weight_HCD[one], bias_HC[one].unsqueeze(1)], 1)
            mapped_CI = mix_CC @ rows_CI
            for first, second in turned.items():  # a complex number times the pair
                mapped_CI[first] = 0.5 * rows_CI[first] - 2 * rows_CI[second]
                mapped_CI[second] = 2 * rows_CI[first] + 0.5 * rows_CI[second]
            rest = [c for c in range(4) if c not in {*turned, *turned.values()}]
            mapped_CI[rest] = mix_CC[rest][:, rest] @ rows_CI[rest]
            weight_HCD[other], bias_HC[other] = mapped_CI[:, :-1], mapped_CI[:, -1]

    def values(weight_HCD, bias_HC):
        for one, other in ((0, 2), (1, 3)):
            weight_HCD[other], bias_HC[other] = mix_CC @ weight_HCD[one], bias_HC[one] + 1

    return dataclasses.replace(facts, key=with_rows(facts.key, keys), value=with_rows(facts.value, values))


@BOTH
@pytest.mark.parametrize("kind", ["plain", "turned", "turned in part", "biased"])
def test_heads_that_say_the_same_in_other_words_are_found_and_merged_without_a_loss(mixing, kind, make_part):
    part = make_part(mixing, kind)
    part = dataclasses.replace(part, attention=alike(part.attention, kind))
    assert error_of(merged(part, kv_heads=2), part) < 1e-4
    assert error_of(merged(part, kv_heads=2, merge="mean"), part) > 0.1


@BOTH
@KINDS
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_solved_heads_are_nearer_than_means(mixing, kind, kv_heads, make_part):
    part = make_part(mixing, kind)
    solved, mean = (error_of(merged(part, kv_heads=kv_heads, merge=merge), part) for merge in ("solved", "mean"))
    assert solved < (1 if kind == "normed" else 0.9) * mean  # normed keys are means themselves


@KINDS
def test_what_pairs_lose_is_what_their_groups_do(kind, make_part):
    part = make_part("causal", kind)
    merge = Merge(part.attention, moments_of(inputs(), "layers.0"))
    lost_HH = merge.lost_by_pairs()
    for a, b in itertools.combinations(range(4), 2):
        assert lost_HH[a, b].item() == lost_HH[b, a].item() == pytest.approx(merge.group((a, b)).lost)


def test_the_mean_is_that_of_neighbours(make_part):
    part = make_part()
    facts = part.attention
    module = merged(part, kv_heads=2, merge="mean")
    for linear, affine in ((module.key, facts.key), (module.value, facts.value)):
        want = affine.weight_OI.view(2, 2, 4, 16).mean(1).flatten(0, 1)
        torch.testing.assert_close(linear.weight, want)
    assert torch.equal(module.query.weight, facts.query.weight_OI)
    assert build("gqa", part).copy_from(part) == ("query", "output")


def test_what_can_not_be_grouped_so_is_refused(make_part, sequence_part):
    for kv_heads in (3, 8):
        with pytest.raises(
            TargetMismatchError, match=rf"found kv_heads={kv_heads} .* Set kv_heads to one of 1, 2, 4\."
        ):
            build("gqa", make_part(), kv_heads=kv_heads)
    with pytest.raises(TargetMismatchError, match="found a part without attention"):
        build("gqa", sequence_part())


def test_not_a_number_in_the_data_names_the_part(make_part):
    part, x_BTD = make_part(), torch.full((1, 4, 16), float("nan"))
    with pytest.raises(NumericalError, match=r"^layers.0: can't solve keys and values, activations are not finite"):
        build("gqa", part).prepare(part, [(x_BTD, x_BTD)])
