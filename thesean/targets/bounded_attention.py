"""The guide's own softmax attention over a bounded number of tokens: the last ones, and those that were worth keeping.

A trained attention puts nearly all of its weight on what is near and on a few tokens that many later ones look at: the
first (Xiao et al. 2024), full stops, names (the heavy hitters of Zhang et al. 2023, H2O). H2O keeps those that were
looked at most so far, one step after the other. Here a linear map of what the attention reads foretells it, solved on
the guide's attention: who stays at each step is then known for a whole sequence at once, and the first tokens need no
rule of their own. On five layers of a pretrained decoder of 135 M parameters half of 128 tokens chosen so leave less
than half of the error that the last 128 and the first 4 leave.

B batch, T time, D width of the part, H heads of queries, G heads of keys and values (H / G queries in a row share one),
C width of a head's query and key, K width of a value, k = K + 1, X = C + 1 + k, W tokens in the window, M tokens that
are kept, and one more that has faded, N = M + 1 + W
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.held_attention import HeldAttention, check_held, held_frame
from thesean.targets.shared.sequence import SequenceOptions
from thesean.targets.shared.worth import foretell

WINDOW = KEPT = 64

# Scores to the logarithm of what a token is looked at: within the last one above the least a kept token fades.
_STEEP = 8


class BoundedAttentionOptions(SequenceOptions):
    """Width rule: heads, groups and widths of the guide's attention."""

    window: int = Field(default=WINDOW, gt=0, description="last tokens that are held, whatever their score")
    kept: int = Field(default=KEPT, gt=0, description="older tokens that are held, those that score highest")


class BoundedAttention(HeldAttention):
    """y_t = last(softmax_s(scale q_t.k_s) v_s), s over the last W tokens, t's own included, and over the M that score
    highest of all before these; queries and keys normed and turned as the guide does.

    Scores are of each head of keys, a linear map of x that `prepare` solves; those that are kept fade as others come
    near to take their place, see kernels/kept_attention.py. A held token is a row of its key, score, value and a 1.
    x_BTD, (held_BGNX, and with a rotation the count of steps_B) -> (y_BTD, the same).
    Keys are turned by their step, counted from each row's first token.
    """

    family = "bounded-attention"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.score = nn.Linear(self.width_in, self.kv_heads).requires_grad_(False)

    def scores(self, x_BTD: torch.Tensor, step_BT: torch.Tensor | None) -> torch.Tensor:
        found_BTG: torch.Tensor = self.score(x_BTD)
        return found_BTG

    def kept(self) -> str:
        told = f"the last {self.window} tokens and {self.places} that were foretold to matter"
        return f"{told} keep their softmax (window=, kept=)"

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Solve the scores on what later tokens of the examples look back at, past the window."""
        if part.attention is None:
            return
        found = foretell(part.attention, [x for x, _ in examples], self.window)
        if found is not None:
            self.score.weight.copy_(_STEEP * found.weight_OI)
            self.score.bias.copy_(_STEEP * found.bias_O)


def check(part: PartFacts, options: BoundedAttentionOptions) -> None:
    """Raises TargetMismatchError where there is no causal attention to take over, or it adds a bias of distance."""
    check_held("bounded-attention", part, options)


def build(part: PartFacts, options: BoundedAttentionOptions) -> BoundedAttention:
    return BoundedAttention(window=options.window, places=options.kept, **held_frame(part, options))


TARGET = Family(
    name="bounded-attention",
    summary="the guide's softmax over the last tokens and those before that were foretold to matter",
    options=BoundedAttentionOptions,
    module=BoundedAttention,
    build=build,
    scope="mixing",
    check=check,
)
