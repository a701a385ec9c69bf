"""How much a change of a head's features would change scores and output.

H heads, K features of a query or key
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.targets.contract import affine
from thesean.targets import AttentionFacts
from thesean.targets.shared.head_metrics import metrics_of
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
