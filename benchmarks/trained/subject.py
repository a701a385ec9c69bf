"""A trained network, what it is converted to, and how it is judged.

B batch, D width, K classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import thesean
from thesean.distill.outputs import OutputKind

Batches = list[Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """`judged` are batches that nothing was fitted on or chosen by, by domain; `compare` tells a figure of outputs of
    two networks on one domain, the guide's second.
    """

    name: str
    guide: torch.nn.Module
    data: Batches
    chosen_by: Batches
    judged: Mapping[str, Batches]
    targets: Mapping[str, str | thesean.Target | dict[str, Any]]
    compare: Callable[[torch.Tensor, torch.Tensor], dict[str, float]]
    lengths: tuple[int, ...] = (64,)  # of a sequence, where there is one
    outputs: Mapping[str, OutputKind] | None = None  # what no label says

    @torch.no_grad()
    def figures(self, model: Any) -> dict[str, float]:
        """By "figure, domain"."""
        found: dict[str, float] = {}
        for domain, batches in self.judged.items():
            own, guide = (torch.cat([_called(m, batch) for batch in batches]) for m in (model, self.guide))
            found |= {f"{name}, {domain}": value for name, value in self.compare(own, guide).items()}
        return found


def _called(model: Any, batch: Any) -> torch.Tensor:
    out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return out if isinstance(out, torch.Tensor) else next(iter(out.values()))


def cosine(own_BD: torch.Tensor, guide_BD: torch.Tensor) -> dict[str, float]:
    """Of embeddings, the mean over examples."""
    return {"cosine": float(torch.cosine_similarity(own_BD, guide_BD, dim=-1).mean())}


def agreement(own_BK: torch.Tensor, guide_BK: torch.Tensor) -> dict[str, float]:
    """How often the likeliest class is the guide's."""
    return {"same class": float((own_BK.argmax(-1) == guide_BK.argmax(-1)).double().mean())}
