"""Heads of keys and values that become one, solved on the activations: which of them, and what stands for them.

B batch, T time, D width of the part, I = D + 1 with a column of biases, O its output, H heads, R of a group, K head
width of queries and keys, V of values
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from thesean.targets.shared.facts import Affine, AttentionFacts
from thesean.targets.shared.head_metrics import HeadMetrics, metrics_of
from thesean.targets.shared.low_rank import root, share
from thesean.targets.shared.select_features import FeatureMoments


class Group(NamedTuple):
    """One head of keys and values for some heads of queries: what each of these makes of its query and of the mean."""

    key_KI: torch.Tensor
    value_VI: torch.Tensor
    query_RKK: torch.Tensor
    output_RVV: torch.Tensor
    lost: float


class Merged(NamedTuple):
    """All of it, the heads of queries in `order_H`, group after group."""

    order_H: torch.Tensor
    query: Affine
    key: Affine
    value: Affine
    output: Affine


class Merge:
    """Heads h of one group share a key k = K x and a value v = V x: q_h'k_h is nearly (T_h q_h)'k and v_h nearly U_h v,
    with the least squared error that their scores and outputs have, counted as `HeadMetrics` does.

    For scores that is the best low rank of all A_h K_h below one another, A_h the root of E[q_h q_h']; for values, with
    the output's. Turned pairs of features stay what they are: as complex numbers, q_h* k_h is nearly (t_h q_h)* k with
    one complex k for each pair, which turns as k_h does. Keys that are normed have no such form: theirs are meant.
    """

    def __init__(self, facts: AttentionFacts, known: FeatureMoments) -> None:
        self.facts = facts
        self.weights: HeadMetrics = metrics_of(facts, known)
        ones = known.mean_E.new_ones(1)
        self.mean_I = torch.cat([known.mean_E, ones])
        self.spread_II = torch.block_diag(known.covariance_EE, 0 * ones)
        self.second_II = self.spread_II + torch.outer(self.mean_I, self.mean_I)
        self.key_HKI, self.value_HVI = (
            torch.cat([a.weight_OI, a.bias_O.unsqueeze(1)], 1).double().unflatten(0, (facts.heads, -1))
            for a in (facts.key, facts.value)
        )

    def into(self, count: int) -> Merged:
        """`count` heads of keys and values, as many queries for each."""
        groups = self._choose(count)
        found = [self.group(heads) for heads in groups]
        order_H = torch.tensor([h for heads in groups for h in heads], device=self.mean_I.device)
        query, output = (a.to(torch.float64) for a in (self.facts.query, self.facts.output))
        turn_HKK = torch.cat([g.query_RKK for g in found])
        query_HKI = torch.cat([query.weight_OI, query.bias_O.unsqueeze(1)], 1).unflatten(0, (len(order_H), -1))[order_H]
        query_HKI = turn_HKK @ query_HKI
        output_OHV = output.weight_OI.unflatten(1, (len(order_H), -1))[:, order_H]
        undo_HVV, shared_HVI = torch.cat([g.output_RVV for g in found]), torch.stack([g.value_VI for g in found])
        shared_HVI = shared_HVI.repeat_interleave(len(order_H) // count, 0)
        missing_HV = (self.value_HVI[order_H] - undo_HVV @ shared_HVI) @ self.mean_I
        return Merged(
            order_H=order_H,
            query=_affine(query_HKI),
            key=_affine(torch.stack([g.key_KI for g in found])),
            value=_affine(torch.stack([g.value_VI for g in found])),
            output=Affine(
                torch.einsum("ohv,hvw->ohw", output_OHV, undo_HVV).flatten(1),
                output.bias_O + torch.einsum("ohv,hv->o", output_OHV, missing_HV),
            ),
        )

    def group(self, heads: tuple[int, ...]) -> Group:
        at = list(heads)
        key_KI, query_RKK, lost = self._keys(at)
        values = share(
            list(self.value_HVI[at]), self.spread_II, [root(m) for m in self.weights.value_HVV[at]],
            self.value_HVI.shape[1],
        )  # fmt: skip
        output_RVV = values.up_NR.unflatten(0, (len(at), -1))
        return Group(key_KI, values.down_RI, query_RKK, output_RVV, lost + values.lost)

    def _keys(self, at: list[int]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The key, the changes of the queries, and what is lost."""
        key_RKI, metric_RKK = self.key_HKI[at], self.weights.key_HKK[at]
        width = key_RKI.shape[1]
        if self.facts.norms is not None:
            mean_KI = key_RKI.mean(0)
            apart_RKI = key_RKI - mean_KI
            lost = torch.einsum("rkl,rli,ij,rkj->", metric_RKK, apart_RKI, self.spread_II, apart_RKI)
            return mean_KI, torch.eye(width).to(mean_KI).repeat(len(at), 1, 1), float(lost)
        made_KI, change_RKK, total = torch.zeros_like(key_RKI[0]), torch.zeros_like(metric_RKK), 0.0
        pairs = [] if self.facts.rotation is None else list(zip(*self.facts.rotation[:2], strict=True))
        for first, second in pairs:
            complex_RI = torch.complex(key_RKI[:, first], key_RKI[:, second])
            metrics = [root(m.to(complex_RI)) for m in metric_RKK[:, first, first].view(-1, 1, 1)]
            shared = share([k.unsqueeze(0) for k in complex_RI], self.second_II, metrics, 1)
            made_KI[first], made_KI[second] = shared.down_RI[0].real, shared.down_RI[0].imag
            factor_R = shared.up_NR[:, 0]
            change_RKK[:, first, first] = change_RKK[:, second, second] = factor_R.real
            change_RKK[:, first, second], change_RKK[:, second, first] = factor_R.imag, -factor_R.imag
            total += shared.lost
        turned = set(itertools.chain(*pairs))
        if rest := [k for k in range(width) if k not in turned]:
            # what is the same for all keys makes no difference to a softmax
            metrics = [root(m[rest][:, rest]) for m in metric_RKK]
            shared = share([k[rest] for k in key_RKI], self.spread_II, metrics, len(rest))
            made_KI[rest] = shared.down_RI
            for r, up_KK in enumerate(shared.up_NR.unflatten(0, (len(at), -1))):
                change_RKK[r][torch.tensor(rest).unsqueeze(1), torch.tensor(rest)] = up_KK.mT
            total += shared.lost
        return made_KI, change_RKK, total

    def lost_by_pairs(self) -> torch.Tensor:
        """(H, H): what `group` loses with each two heads, from products of all heads that are made once."""
        metrics = self.weights.key_HKK
        lost_HH = _least_shared(self.value_HVI, self.weights.value_HVV, self.spread_II)
        if self.facts.norms is not None:
            gram_HKHK = _gram(self.key_HKI, self.spread_II)
            for a, b in itertools.combinations(range(len(metrics)), 2):
                same_KK, cross_KK = gram_HKHK[a, :, a] + gram_HKHK[b, :, b], gram_HKHK[a, :, b]
                apart_KK = (same_KK - cross_KK - cross_KK.mT) / 4  # of half their difference
                lost_HH[a, b] = lost_HH[b, a] = lost_HH[a, b] + ((metrics[a] + metrics[b]) * apart_KK).sum()
            return lost_HH
        rest = torch.ones(metrics.shape[1], dtype=torch.bool)
        for first, second in [] if self.facts.rotation is None else zip(*self.facts.rotation[:2], strict=True):
            rest[first] = rest[second] = False
            complex_H1I = torch.complex(self.key_HKI[:, first], self.key_HKI[:, second]).unsqueeze(1)
            lost_HH += _least_shared(complex_H1I, metrics[:, first, first].view(-1, 1, 1), self.second_II)
        if rest.any():
            lost_HH += _least_shared(self.key_HKI[:, rest], metrics[:, rest][:, :, rest], self.spread_II)
        return lost_HH

    def _choose(self, count: int) -> list[tuple[int, ...]]:
        """Neighbours first, then two heads change places as long as what pairs lose together becomes less."""
        heads = self.facts.heads
        size = heads // count
        groups = [list(range(start, start + size)) for start in range(0, heads, size)]
        if size in (1, heads):
            return [tuple(g) for g in groups]
        lost_HH = self.lost_by_pairs()
        least = 1e-9 * float(lost_HH.max())
        while True:
            gains = {
                (a, b): _gain(lost_HH, one, other, a, b)
                for one, other in itertools.combinations(groups, 2)
                for a in one
                for b in other
            }
            (a, b), gain = max(gains.items(), key=lambda item: item[1])
            if gain <= least:
                return [tuple(sorted(g)) for g in groups]
            groups = [[b if h == a else a if h == b else h for h in g] for g in groups]


def _gram(rows_HKI: torch.Tensor, covariance_II: torch.Tensor) -> torch.Tensor:
    """(H, K, H, K): second moments of all heads' outputs."""
    flat_NI = rows_HKI.flatten(0, 1)
    sizes = rows_HKI.shape[:2]
    return (flat_NI @ covariance_II.to(flat_NI) @ flat_NI.mH).unflatten(1, sizes).unflatten(0, sizes)


def _least_shared(rows_HKI: torch.Tensor, metric_HKK: torch.Tensor, covariance_II: torch.Tensor) -> torch.Tensor:
    """(H, H): what two heads lose in one of their width, as `share` tells it."""
    heads, width = rows_HKI.shape[:2]
    roots_HKK = torch.stack([root(m).root_KK for m in metric_HKK]).to(rows_HKI)
    gram_HKHK = _gram(roots_HKK @ rows_HKI, covariance_II)
    lost_HH = torch.zeros(heads, heads, dtype=torch.float64, device=rows_HKI.device)
    for a, b in itertools.combinations(range(heads), 2):
        both = [a, b]
        values_N = torch.linalg.eigvalsh(gram_HKHK[both][:, :, both].flatten(2).flatten(0, 1))
        lost_HH[a, b] = lost_HH[b, a] = values_N[:width].clamp_min(0).sum()
    return lost_HH


def _gain(lost_HH: torch.Tensor, one: list[int], other: list[int], a: int, b: int) -> float:
    """By how much less pairs lose where a of the one group and b of the other change places."""
    stay, come = [h for h in one if h != a], [h for h in other if h != b]
    before = lost_HH[a, stay].sum() + lost_HH[b, come].sum()
    return float(before - lost_HH[b, stay].sum() - lost_HH[a, come].sum())


def _affine(rows_HKI: torch.Tensor) -> Affine:
    rows_EI = rows_HKI.flatten(0, 1)
    return Affine(rows_EI[:, :-1], rows_EI[:, -1])
