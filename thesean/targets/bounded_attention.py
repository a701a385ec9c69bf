"""The guide's own softmax attention over a bounded number of tokens: the last ones, and those that were worth keeping.

A trained attention puts nearly all of its weight on what is near and on a few tokens that many later ones look at: the
first (Xiao et al. 2024), full stops, names (the heavy hitters of Zhang et al. 2023, H2O). H2O keeps those that were
looked at most so far, one step after the other. Here a linear map of what the attention reads foretells it, solved on
the guide's attention: who stays at each step is then known for a whole sequence at once, and the first tokens need no
rule of their own. What a token is worth is lost with its age, at each head's own pace, but for the few that are worth
many times the others: see shared/lifetimes.py. On ten layers of a pretrained decoder of 135 M parameters, solved on 512
tokens, 64 tokens chosen so beside the last 64 leave 1/4 of the error that the last 124 and the first 4 leave at 2,048,
and 0.7 of what they leave when their worth is taken to stay.

B batch, T time, D width of the part, H heads of queries, G heads of keys and values (H / G queries in a row share one),
C width of a head's query and key, K width of a value, W tokens in the window, M tokens that are kept, and one more that
has faded, N = M + 1 + W
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from thesean.kernels.kept_attention import LASTING
from thesean.kernels.shared.precision import wide
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.held_attention import HeldAttention, check_held, held_frame
from thesean.targets.shared.lifetimes import OUTLIVES, lifetimes
from thesean.targets.shared.sequence import SequenceOptions
from thesean.targets.shared.worth import foretell

WINDOW = KEPT = 64

# A token fades over as many steps as tokens are kept, and over no fewer than these: of scores that a block's worth of
# steps raised by much more than 1, float32 tells too little.
_SHORTEST_FADE = 8


class BoundedAttentionOptions(SequenceOptions):
    """Width rule: heads, groups and widths of the guide's attention."""

    window: int = Field(default=WINDOW, gt=0, description="last tokens that are held, whatever their score")
    kept: int = Field(default=KEPT, gt=0, description="older tokens that are held, those that score highest")


class BoundedAttention(HeldAttention):
    """y_t = last(softmax_s(scale q_t.k_s) v_s), s over the last W tokens, t's own included, and over the M that score
    highest of all before these; queries and keys normed and turned as the guide does.

    Scores are of each head of keys, a linear map of x that `prepare` solves; by 1 less with every `fade` tokens that
    come, but for those above the head's `lasting` (0: they never change). Kept tokens fade as others come near to take
    their place, see kernels/kept_attention.py. x_BTD, (key_BGNC, value_BGNK, marks_BG2N, and with a rotation the count
    of steps_B) -> (y_BTD, the same). Keys are turned by their step, counted from each row's first token.
    """

    family = "bounded-attention"
    saved = (*HeldAttention.saved, "fade")

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.score = nn.Linear(self.width_in, self.kv_heads).requires_grad_(False)
        if self.fade:
            self.lasting = nn.Parameter(torch.full((self.kv_heads,), torch.inf), requires_grad=False)

    def scores(self, x_BTD: torch.Tensor, step_BT: torch.Tensor | None) -> torch.Tensor:
        score_BTG: torch.Tensor = self.score(x_BTD)
        if not self.fade:
            return score_BTG
        score_BTG = wide(score_BTG)  # half precision would see no difference between those that last
        return torch.where(score_BTG > self.lasting, score_BTG + LASTING, score_BTG)

    def kept(self) -> str:
        told = f"the last {self.window} tokens and {self.places} that were foretold to matter"
        return f"{told} keep their softmax (window=, kept=)"

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Solve the scores on what later tokens of the examples look back at, past the window."""
        if part.attention is None:
            return
        inputs = [x for x, _ in examples]
        worth = foretell(part.attention, inputs, self.window)
        if worth is None:
            return
        life = lifetimes(part.attention, inputs, worth, self.window, self.places)
        slope_G = life.steps_G / max(1, self.fade)
        self.score.weight.copy_(slope_G.unsqueeze(1) * worth.weight_OI)
        self.score.bias.copy_(slope_G * (worth.bias_O - life.middle_G))
        if self.fade:
            self.lasting.copy_(slope_G * OUTLIVES)


def check(part: PartFacts, options: BoundedAttentionOptions) -> None:
    """Raises TargetMismatchError where there is no causal attention to take over, or it adds a bias of distance."""
    check_held("bounded-attention", part, options)


def build(part: PartFacts, options: BoundedAttentionOptions) -> BoundedAttention:
    fade = max(options.kept, _SHORTEST_FADE)
    return BoundedAttention(window=options.window, places=options.kept, fade=fade, **held_frame(part, options))


TARGET = Family(
    name="bounded-attention",
    summary="the guide's softmax over the last tokens and those before that were foretold to matter",
    options=BoundedAttentionOptions,
    module=BoundedAttention,
    build=build,
    scope="mixing",
    check=check,
)
