"""For how long a token is worth its place among those that are kept, by what it is worth at first.

A token that is worth e times another is kept so many steps longer, whatever both are worth: of two tokens the one whose
time ends first is then the same at every step, and who is kept is known for a whole sequence at once. How many steps is
each head's own: some look for what was said last, others for names wherever they were. But what a trained attention
looks at always, its first token above all, never ages: with any pace it would be lost in the end.

B batch, T time, D width, H heads of queries, G heads of keys and values, M queries that are looked at, O width of the
output, V of a head's value
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch

from thesean.kernels.shared.precision import wide
from thesean.targets.shared.facts import Affine, AttentionFacts
from thesean.targets.shared.locality import rows

# Of worth, as a logarithm: what is above the middle by more never ages.
OUTLIVES = 3.5

# Steps that a token is kept longer for each e times its worth, in tokens that are kept, the slowest first: of equals
# that one stays.
_PACES = (16, 8, 4, 2, 1)
_ROWS = 8


class Lifetimes(NamedTuple):
    """By each head of keys: the worth, as a logarithm, that half of the tokens exceed, and the steps that a token is
    kept longer for each e times its worth.
    """

    middle_G: torch.Tensor
    steps_G: torch.Tensor


@torch.no_grad()
def lifetimes(
    facts: AttentionFacts, inputs: Sequence[torch.Tensor], worth: Affine, window: int, kept: int
) -> Lifetimes:
    """The pace by which the attention over the last `window` tokens and `kept` older ones is nearest to the whole one
    on sequences x_BTD, each head of keys by itself. `worth` foretells the logarithm of what a token is looked at.
    """
    looked = list(islice((row for x_BTD in inputs for row in rows(facts, x_BTD, None)), _ROWS))
    worth_GT = [worth.of(wide(row.x_TD)).mT for row in looked]
    if not looked:
        return Lifetimes(worth.bias_O.clone(), torch.full_like(worth.bias_O, float(_PACES[0] * kept)))
    middle_G = torch.cat(worth_GT, 1).median(1).values
    errors_PG = torch.zeros(len(_PACES), len(middle_G), dtype=torch.float64)
    for row, found_GT in zip(looked, worth_GT, strict=True):
        above_GT = found_GT - middle_G.unsqueeze(1)
        whole_HMT = row.scores_HMT.softmax(-1)
        for index, pace in enumerate(_PACES):
            step_T = torch.arange(found_GT.shape[1], device=found_GT.device)
            ends_GT = torch.where(above_GT > OUTLIVES, torch.inf, step_T + pace * kept * above_GT)
            seen_HMT = row.seeing(row.keeping(ends_GT, window, kept)).softmax(-1)
            errors_PG[index] += _errors(facts, seen_HMT.sub_(whole_HMT) @ row.value_HTV).cpu()
    best_G = errors_PG.argmin(0)
    steps_G = torch.tensor(_PACES, dtype=middle_G.dtype)[best_G] * kept
    return Lifetimes(middle_G, steps_G.to(middle_G.device))


def _errors(facts: AttentionFacts, wrong_HMV: torch.Tensor) -> torch.Tensor:
    """(G,): squared error of what each group of heads adds to the output, by what its means are off."""
    heads, groups = facts.heads, facts.kv_heads
    out_HVO = facts.output.weight_OI.to(wrong_HMV.dtype).mT.unflatten(0, (heads, -1))
    added_GMO = (wrong_HMV @ out_HVO).unflatten(0, (groups, -1)).sum(1)
    return added_GMO.square().sum((1, 2)).double()
