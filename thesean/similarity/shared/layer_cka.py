"""Debiased CKA between every layer of one network and every layer of another, a batch at a time.

L layers of one side, M of the other, N examples of a batch
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thesean.kernels.shared.precision import accumulator, full_precision, widen
from thesean.similarity.shared.hsic import u_centred


class LayerCKA:
    """Sums of debiased HSICs (Nguyen et al. 2021, eq. 4): memory does not grow with the data."""

    def __init__(self) -> None:
        self.examples = 0
        self.cross_LM = self.own_L = self.own_M = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        """A batch of N >= 4 examples, as the `u_centred` Grams of every layer: all (N, N)."""
        self._add(*widen(*(torch.stack(widen(*grams)) for grams in (a, b))))

    def _add(self, a_LNN: torch.Tensor, b_MNN: torch.Tensor) -> None:
        n, a_LN, b_MN = a_LNN.shape[1], a_LNN.flatten(1), b_MNN.flatten(1)
        with full_precision(a_LN.device):
            cross_LM = a_LN @ b_MN.mT
        # weighted by examples: n times the mean <U, V> / (n (n - 3))
        self.cross_LM = self.cross_LM + _wide(cross_LM) / (n - 3)
        self.own_L = self.own_L + _squares(a_LNN) / (n - 3)
        self.own_M = self.own_M + _squares(b_MNN) / (n - 3)
        self.examples += n

    def matrix(self) -> torch.Tensor:
        """(L, M), in float64; NaN for a layer whose output does not vary."""
        return self.cross_LM / (self.own_L.unsqueeze(1) * self.own_M).sqrt()


def layer_cka(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """Debiased CKA of each features in `a`, (N, width), with each in `b`, the same N >= 4 examples -> (L, M)."""
    running, sides = LayerCKA(), []
    for features in (a, b):
        dtype = widen(*(x_NP.flatten()[:1] for x_NP in features))[0].dtype
        grams_LNN = features[0].new_empty(len(features), len(features[0]), len(features[0]), dtype=dtype)
        for x_NP, gram_NN in zip(features, grams_LNN, strict=True):
            u_centred(x_NP, out=gram_NN)
        sides.append(grams_LNN)
    with torch.no_grad():
        running._add(*widen(*sides))
    return running.matrix()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(accumulator(x.device)).cpu().double()


def _squares(x_LNN: torch.Tensor) -> torch.Tensor:
    # the sum over a Gram's row in float32, that over the rows in float64: norm() of a large Gram is off by 1e-4 on CPU
    return _wide(torch.linalg.vecdot(x_LNN, x_LNN)).sum(1)
