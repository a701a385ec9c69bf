"""What the closed form is compared with: each part on activations that are computed from the inputs again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from thesean.distill.closed_form import solve_alone
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.graph.modes import evaluating
from thesean.passes.plan.hybrid import Hybrid
from thesean.targets import TargetModule

Inputs = dict[str, torch.Tensor]


@torch.no_grad()
def prepare(guide: fx.GraphModule, hybrid: Hybrid, batches: Sequence[Inputs]) -> None:
    for r in hybrid.replacements:
        module = hybrid.module(r)
        if isinstance(module, TargetModule):
            ends = intermediates(guide, [r.guide_entry, r.guide_exit], with_output=False)
            values = [ends(**inputs) for inputs in batches]
            module.prepare(r.facts, [(v[r.guide_entry], v[r.guide_exit]) for v in values])


@torch.no_grad()
def solve(guide: fx.GraphModule, hybrid: Hybrid, parts: Sequence[int], batches: Sequence[Inputs], ridge: float) -> None:
    for r in (r for part in parts for r in hybrid.of_part(part)):
        with evaluating(hybrid.graph_module):
            stream = [r.join[1]] if r.join else []
            own = intermediates(hybrid.graph_module, [r.entry, *stream], with_output=False)
            want = r.guide_join if r.join and r.guide_join else r.guide_exit
            theirs = intermediates(guide, [want], with_output=False)
            examples = []
            for inputs in batches:
                mine, target = own(**inputs), theirs(**inputs)[want]
                examples.append((mine[r.entry], target - mine[r.join[1]] if r.join else target))
        solve_alone(hybrid.module(r), examples, ridge=ridge, where=r.facts.path)
