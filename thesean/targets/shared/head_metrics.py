"""What an error of a head's keys and values counts for, in units of the part's output.

B batch, T time, D width of the part, O its output, H heads, K head width of queries and keys, V of values
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from thesean.errors import NumericalError
from thesean.targets.shared.facts import AttentionFacts
from thesean.targets.shared.select_features import FeatureMoments, moments


class HeadMetrics(NamedTuple):
    """An error e of a head's key counts for e' key_HKK e, one of its value for e' value_HVV e, in double: squares of
    what moves. Scores count for as much as the values that they choose from differ in the output.
    """

    key_HKK: torch.Tensor
    value_HVV: torch.Tensor


def metrics_of(facts: AttentionFacts, known: FeatureMoments) -> HeadMetrics:
    """From the guide's weights and the moments of what it reads. Turned queries meet keys at any angle: the two of
    a pair count alike, and for themselves.
    """
    output_OHV = facts.output.weight_OI.double().unflatten(1, (facts.heads, -1))
    value_HVV = torch.einsum("ohv,ohw->hvw", output_OHV, output_OHV)
    spread_HVV = _spread(facts.value.weight_OI, facts.heads, known)
    worth_H = torch.einsum("hvw,hwv->h", value_HVV, spread_HVV)
    key_HKK = _second(facts.query, facts.heads, known)
    if facts.norms is not None:  # as if all steps' were of one length
        query_norm, key_norm = facts.norms
        weight = query_norm.weight.double() * key_norm.weight.double()
        length_H11 = _mean_square(key_HKK) * _mean_square(_second(facts.key, facts.heads, known))
        key_HKK = key_HKK * (weight.unsqueeze(-1) * weight.unsqueeze(-2)) / length_H11.clamp_min(1e-30)
    if facts.rotation is not None:
        key_HKK = _at_any_angle(key_HKK, facts.rotation.first, facts.rotation.second)
    return HeadMetrics(facts.scale**2 * worth_H.view(-1, 1, 1) * key_HKK, value_HVV)


def moments_of(inputs: Iterable[torch.Tensor], path: str) -> FeatureMoments:
    """Of what a part reads. Raises NumericalError where it is not finite."""
    try:
        return moments(x_BTD.flatten(0, -2) for x_BTD in inputs)
    except ValueError as error:
        raise NumericalError(f"{path}: can't solve keys and values, {error}. Look for NaN in the data.") from error


def _spread(weight_ED: torch.Tensor, heads: int, known: FeatureMoments) -> torch.Tensor:
    weight_HKD = weight_ED.double().unflatten(0, (heads, -1))
    return weight_HKD @ known.covariance_EE @ weight_HKD.mT


def _second(affine: tuple[torch.Tensor, torch.Tensor], heads: int, known: FeatureMoments) -> torch.Tensor:
    """E[q q'] of each head."""
    weight_ED, bias_E = (t.double() for t in affine)
    mean_HK1 = (weight_ED @ known.mean_E + bias_E).view(heads, -1, 1)
    return _spread(weight_ED, heads, known) + mean_HK1 @ mean_HK1.mT


def _mean_square(second_HKK: torch.Tensor) -> torch.Tensor:
    return second_HKK.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)


def _at_any_angle(key_HKK: torch.Tensor, first: Sequence[int], second: Sequence[int]) -> torch.Tensor:
    pairs = torch.tensor([first, second], device=key_HKK.device)
    rest = torch.ones(key_HKK.shape[1], dtype=key_HKK.dtype, device=key_HKK.device)
    rest[pairs.flatten()] = 0
    diagonal_HK = key_HKK.diagonal(dim1=1, dim2=2) * rest
    both_HP = key_HKK.diagonal(dim1=1, dim2=2)[:, pairs].mean(1)
    diagonal_HK[:, pairs[0]] = diagonal_HK[:, pairs[1]] = both_HP
    apart_HKK = key_HKK * rest * rest.unsqueeze(-1)
    apart_HKK.diagonal(dim1=1, dim2=2).copy_(diagonal_HK)
    return apart_HKK
