"""FLOPs worked by hand, where torch counts what chunks, windows and fused cells multiply beside what they must.

B batch, T time, D width
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.targets.build import build
from tests.targets.contract import affine, block
from thesean.targets import AttentionFacts, PartFacts
from thesean.targets.shared.head_norm import HeadNorm


def narrow_values() -> AttentionFacts:
    """Of 16 features: 4 heads in 2 groups, queries and keys of 5 and values of 3."""
    query, output = affine(20, 16, 0), affine(16, 12, 3)
    key, value = (
        type(one)(*(rows.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1) for rows in one))
        for one in (affine(10, 16, 1), affine(6, 16, 2))
    )
    return AttentionFacts(heads=4, scale=0.5, query=query, key=key, value=value, output=output, plain=True)


# Of 16 features: maps of x, of queries, keys, values and out, of 4 heads and 2 groups
HEADS = 16 * (4 * 5 + 2 * 5 + 2 * 3 + 4 * 3)
FADES = 16 * 2  # what says how fast each group forgets
LINEAR = HEADS + FADES + (2 + 4) * (2 * 5) * (3 + 1)  # k v' and k into a group's state, and q out of it
MAPS = (4 + 2) * 5 * 5  # of queries and of keys, where they can't be folded in
WINDOW = MAPS + 4 * (8 + 3) * (5 + 3 + 1)  # q k', times v and one, of 8 tokens and 3 sinks
NEURONS = 16 * 32 + 32 * 16

WORK: dict[str, tuple[str, dict[str, Any], int]] = {
    "delta": ("delta", {}, 16 * (4 * 5 * 2 + 4 * 3 * 2) + 16 * (4 + 4) + 3 * 4 * 5 * 3),  # one state a head
    "sliding": ("sliding", {"window": 8, "sinks": 3}, HEADS + 4 * (8 + 3) * (5 + 3 + 1)),
    "bounded": ("bounded-attention", {"window": 8, "kept": 6}, HEADS + 16 * 2 + 4 * (8 + 6) * (5 + 3 + 1)),
    "linear": ("linear-attention", {}, LINEAR),
    "windowed": ("linear-attention", {"window": 8, "sinks": 3}, LINEAR + WINDOW),
    "ssm": ("ssm", {"width": 8, "heads": 2, "state": 3}, 16 * 8 * 3 + 8 * (2 * 3 + 2) + 8 * 4 + 2 * 8 * 3),
    "lstm": ("lstm", {"width": 8}, 4 * 8 * (16 + 8) + 8 * 16),
}


@pytest.mark.parametrize("name", WORK)
def test_flops_are_two_for_each_product_that_a_token_needs(name, sequence_part):
    family, options, products = WORK[name]
    part = sequence_part(attention=narrow_values())
    assert build(family, part, **options).flops(part, {"batch": 3, "time": 7}) == 2 * 3 * 7 * products


def test_neurons_beside_linear_heads_count_their_maps(sequence_part):
    facts = replace(block(), attention=narrow_values())
    part = replace(sequence_part(), block=facts)
    module = build("parallel-block", part, taps=0)
    assert module.flops(part, {"batch": 3, "time": 7}) == 2 * 3 * 7 * (LINEAR + NEURONS)


@pytest.mark.parametrize("normed", [False, True])
def test_one_token_more_costs_linear_heads_what_torch_counts(normed, sequence_part):
    """Both ways, where no chunk is padded. Norms stand between projections and feature maps, which can't be folded."""
    norms = (HeadNorm(torch.ones(5), 1e-6),) * 2 if normed else None
    part: PartFacts = sequence_part("bidirectional", attention=replace(narrow_values(), norms=norms))
    module = build("linear-attention", part).eval()
    counted = []
    for time in (9, 10):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.randn(1, time, 16))
        counted.append(counter.get_total_flops())
    ones = 2 * 16 * 2  # the column of ones of each group is made by a row of zeros: nothing that must be multiplied
    assert module.flops(part, {"batch": 1, "time": 1}) == counted[1] - counted[0] - ones
