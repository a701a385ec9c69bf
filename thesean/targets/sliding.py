"""The guide's own softmax attention over the last tokens and the first few, in memory that does not grow.

Trained attentions put much of their weight on the first tokens, whatever these are: a window that loses them loses what
its softmax was divided by (Xiao et al. 2024, StreamingLLM). Here both stand at their true distance, so that all is the
guide's as long as nothing has left the window.

B batch, T time, D width of the part, G heads of keys and values, C width of a head's key, K width of a value, W tokens
in the window, S sinks, N = S + 1 + W
"""

from __future__ import annotations

import torch
from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.held_attention import HeldAttention, check_held, held_frame
from thesean.targets.shared.sequence import SequenceOptions

WINDOW, SINKS = 64, 4


class SlidingOptions(SequenceOptions):
    """Width rule: heads, groups and widths of the guide's attention."""

    window: int = Field(default=WINDOW, gt=0, description="last tokens that are held")
    sinks: int = Field(default=SINKS, ge=0, description="first tokens that are held for good")


class Sliding(HeldAttention):
    """y_t = last(softmax_s(scale q_t.k_s) v_s), s over the last W tokens, t's own included, and over the first S;
    queries and keys normed and turned as the guide does. With W tokens or fewer it is the guide's attention.

    x_BTD, (key_BGNC, value_BGNK, marks_BG2N, steps_B) -> (y_BTD, the same). What is held: S + 1 places for the first
    tokens, the last of which counts for nothing, and W for the last ones. A token's score is minus its step, so that of
    those that leave the window the first stay.
    """

    family = "sliding"
    always_counts = True

    def scores(self, x_BTD: torch.Tensor, step_BT: torch.Tensor | None) -> torch.Tensor:
        assert step_BT is not None  # always_counts
        return -step_BT.to(x_BTD.dtype).unsqueeze(-1).expand(-1, -1, self.kv_heads)

    def kept(self) -> str:
        first = f" and the first {self.places}" if self.places else ""
        return f"the last {self.window} tokens{first} keep their softmax, older ones are not seen (window=, sinks=)"


def check(part: PartFacts, options: SlidingOptions) -> None:
    """Raises TargetMismatchError where there is no causal attention to take over, or it adds a bias of distance."""
    check_held("sliding", part, options)


def build(part: PartFacts, options: SlidingOptions) -> Sliding:
    return Sliding(window=options.window, places=options.sinks, **held_frame(part, options))


TARGET = Family(
    name="sliding",
    summary="the guide's softmax over the last tokens and the first few",
    options=SlidingOptions,
    module=Sliding,
    build=build,
    scope="mixing",
    check=check,
)
