"""CKA of all examples from sums over examples, so that they can come in batches of any size.

HSIC needs |X'Y|^2 and, debiased, the inner product of the Grams' diagonals |x_i - mean x|^2 and |y_i - mean y|^2. Both
are polynomials in sums over i of x_i, |x_i|^2, x_i y_i', |x_i|^2 y_i, ... of the features as they come.

N examples of a batch, P width of x, Q width of y
"""

from __future__ import annotations

from itertools import product

import torch

from thesean.kernels.shared.precision import accumulator


class Moments:
    """The sums, in float64, of features less the first batch's mean: an offset then costs no digits."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: list[torch.Tensor] = []
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, x_NP: torch.Tensor, y_NQ: torch.Tensor) -> None:
        wide = accumulator(x_NP.device)
        sides = [z.to(wide) for z in (x_NP, y_NQ)]
        if not self.shift:
            self.shift = [z.mean(0) for z in sides]
        features = {name: z - shift for name, z, shift in zip("xy", sides, self.shift, strict=True)}
        squares = {name: z.square().sum(1) for name, z in features.items()}
        for a, z in features.items():
            self._sum(a, z.sum(0))
            self._sum(f"|{a}|", squares[a].sum())
        for a, b in product("xy", repeat=2):
            self._sum(f"|{a}|{b}", squares[a] @ features[b])
            if a <= b:
                self._sum(a + b, features[a].mT @ features[b])
                self._sum(f"|{a}||{b}|", squares[a] @ squares[b])
        self.n += x_NP.shape[0]

    def _sum(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def cka(self, *, debiased: bool) -> torch.Tensor:
        """Of all examples so far; NaN where a side does not vary. A scalar in float64."""
        xy, xx, yy = (self._hsic(a, b, debiased) for a, b in ("xy", "xx", "yy"))
        return (xy / (xx * yy).sqrt()).cpu()

    def _hsic(self, a: str, b: str, debiased: bool) -> torch.Tensor:
        n, s = self.n, self.sums
        mean_a, mean_b = s[a] / n, s[b] / n
        inner = (s[a + b] - n * torch.outer(mean_a, mean_b)).square().sum()
        if not debiased:
            return inner
        length_a, length_b = mean_a.dot(mean_a), mean_b.dot(mean_b)
        trace_a, trace_b = s[f"|{a}|"] - n * length_a, s[f"|{b}|"] - n * length_b
        # sum over i of |a_i - m|^2 |b_i - k|^2, each |a_i|^2 - 2 m.a_i + |m|^2, multiplied out
        diagonals = (
            s[f"|{a}||{b}|"]
            - 2 * s[f"|{a}|{b}"].dot(mean_b)
            - 2 * s[f"|{b}|{a}"].dot(mean_a)
            + 4 * mean_a @ s[a + b] @ mean_b
            + length_b * s[f"|{a}|"]
            + length_a * s[f"|{b}|"]
            - 3 * n * length_a * length_b
        )
        return inner - diagonals * (n / (n - 2)) + trace_a * trace_b / ((n - 1) * (n - 2))
