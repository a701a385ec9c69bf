"""Solve a part's last linear layer: ridge regression onto the guide's activations, part after part.

For features f and residual r = guide's stream after the part - hybrid's stream before it (or simply the guide's output
of the part where it isn't added to a stream), minimise |W f + b - r|^2 + lambda |W - W0|^2 over W and b, with centred
statistics: dW = R_f' (C + lambda I)^-1. Solving for the stream instead of the part's own output corrects what earlier
parts left over. W0 is what the layer holds: zero influence for fresh layers, the guide's weights for copied ones.

N examples (tokens or images), E features, O outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from thesean.errors import NumericalError
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.modes import evaluating
from thesean.passes.plan.hybrid import Hybrid, Replacement
from thesean.targets import TargetModule

Inputs = dict[str, torch.Tensor]


@torch.no_grad()
def solve_parts(
    guide: fx.GraphModule,
    hybrid: Hybrid,
    parts: Sequence[int],
    batches: Sequence[Inputs],
    *,
    ridge: float,
    solve_copied: bool = True,
) -> list[str]:
    """Refit the last layers of `parts`, in order; returns the modules solved. Leaves train/eval flags as they were."""
    with evaluating(hybrid.graph_module):
        return [
            r.name
            for part in parts
            for r in hybrid.of_part(part)
            if (solve_copied or "output" not in r.copied) and _solve(guide, hybrid, r, batches, ridge)
        ]


def _solve(guide: fx.GraphModule, hybrid: Hybrid, r: Replacement, batches: Sequence[Inputs], ridge: float) -> bool:
    module = hybrid.module(r)
    if not isinstance(module, TargetModule) or not hasattr(module, "last"):
        return False  # no last layer to solve
    own_names = [r.entry] + ([r.join[1]] if r.join else [])
    own = intermediates(hybrid.graph_module, own_names, with_output=False)
    want = r.guide_join if r.join and r.guide_join else r.guide_exit
    theirs = intermediates(guide, [want], with_output=False)
    sums = _Sums(module.last)
    for inputs in batches:
        mine, target = own(**inputs), theirs(**inputs)[want]
        x = mine[r.entry]
        features, _ = module.features(x)
        residual = target - mine[r.join[1]] if r.join else target
        skip = module.skip(x)
        sums.add(features, module.unshape(residual if skip is None else residual - skip))
    sums.solve(ridge, r.facts.path)
    return True


@torch.no_grad()
def solve_alone(
    module: torch.nn.Module, examples: Sequence[tuple[torch.Tensor, torch.Tensor]], *, ridge: float, where: str
) -> bool:
    """Refit a module's last layer on (input, wanted output) pairs; whether it has one. Leaves train/eval flags as they
    were.
    """
    if not isinstance(module, TargetModule) or not hasattr(module, "last"):
        return False
    with evaluating(module):
        sums = _Sums(module.last)
        for x, wanted in examples:
            features, _ = module.features(x)
            skip = module.skip(x)
            sums.add(features, module.unshape(wanted if skip is None else wanted - skip))
        sums.solve(ridge, where)
    return True


class _Sums:
    """Running statistics of features and residuals, in double: fp32 loses the small eigenvalues."""

    def __init__(self, last: torch.nn.Linear) -> None:
        self.last = last
        self.count = 0
        self.features_E: Any = 0
        self.errors_O: Any = 0
        self.covariance_EE: Any = 0
        self.cross_EO: Any = 0

    def add(self, features: torch.Tensor, residual: torch.Tensor) -> None:
        f_NE = features.reshape(-1, self.last.in_features)
        r_NO = residual.reshape(-1, self.last.out_features)
        error_NO = (r_NO - self.last(f_NE)).double()
        f_NE = f_NE.double()
        self.count += f_NE.shape[0]
        self.features_E = self.features_E + f_NE.sum(0)
        self.errors_O = self.errors_O + error_NO.sum(0)
        self.covariance_EE = self.covariance_EE + f_NE.T @ f_NE
        self.cross_EO = self.cross_EO + f_NE.T @ error_NO

    def solve(self, ridge: float, where: str) -> None:
        mean_E, mean_O = self.features_E / self.count, self.errors_O / self.count
        covariance_EE = self.covariance_EE / self.count - torch.outer(mean_E, mean_E)
        cross_EO = self.cross_EO / self.count - torch.outer(mean_E, mean_O)
        diagonal = covariance_EE.diagonal()
        penalty = ridge * diagonal.mean().clamp_min(1e-12)
        if not bool(torch.isfinite(covariance_EE).all() and torch.isfinite(cross_EO).all()):
            raise NumericalError(
                f"{where}: activations are not finite, so its last layer can't be solved. Look for NaN in the data."
            )
        delta_EO = torch.linalg.solve(covariance_EE + penalty * torch.eye(len(diagonal)).to(covariance_EE), cross_EO)
        self.last.weight.add_(delta_EO.T.to(self.last.weight.dtype))
        if self.last.bias is not None:
            self.last.bias.add_((mean_O - mean_E @ delta_EO).to(self.last.bias.dtype))
