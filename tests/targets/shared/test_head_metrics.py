"""How much a change of a head's features would change scores and output.

H heads, K features of a query or key
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.targets.contract import affine
from thesean.targets import AttentionFacts
from thesean.targets.shared.head_metrics import _at_any_angle, metrics_of
from thesean.targets.shared.head_norm import HeadNorm
from thesean.targets.shared.select_features import moments


def test_features_of_normed_queries_and_keys_count_by_both_weights():
    maps: dict[str, Any] = {name: affine(6, 6, seed) for seed, name in enumerate(("query", "key", "value", "output"))}
    facts = AttentionFacts(heads=2, scale=0.5, plain=True, **maps)
    known = moments([torch.randn(50, 6)])
    first_K, second_K = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([-1.0, 0.25, 1.5])
    of_ones, of_weights = (
        metrics_of(replace(facts, norms=(HeadNorm(q, 1e-6), HeadNorm(k, 1e-6))), known)
        for q, k in ((torch.ones(3), torch.ones(3)), (first_K, second_K))
    )
    weight_K = (first_K * second_K).double()
    torch.testing.assert_close(of_weights.key_HKK, of_ones.key_HKK * torch.outer(weight_K, weight_K))
    torch.testing.assert_close(of_weights.value_HVV, of_ones.value_HVV)


def test_features_that_turn_count_in_pairs_and_apart_from_those_that_do_not():
    maps: dict[str, Any] = {name: affine(8, 8, seed) for seed, name in enumerate(("query", "key", "value", "output"))}
    facts = AttentionFacts(heads=2, scale=0.5, plain=True, **maps)
    still_HKK = metrics_of(facts, moments([torch.randn(50, 8)])).key_HKK
    turned_HKK = _at_any_angle(still_HKK, (0,), (2,))
    rest = torch.tensor([1, 3])
    torch.testing.assert_close(turned_HKK[:, rest][:, :, rest], still_HKK[:, rest][:, :, rest])
    both_H = (still_HKK[:, 0, 0] + still_HKK[:, 2, 2]) / 2
    for pair in (0, 2):
        torch.testing.assert_close(turned_HKK[:, pair, pair], both_H)
        others = [k for k in range(4) if k != pair]
        assert (turned_HKK[:, pair, others] == 0).all()
        assert (turned_HKK[:, others, pair] == 0).all()
