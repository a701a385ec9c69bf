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
from typing import Any, Unpack

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from thesean.targets.shared.copying import copy_affine
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family
from thesean.targets.shared.head_norm import NormForm, copy_norms, head_norms
from thesean.targets.shared.held import Held
from thesean.targets.shared.module import State
from thesean.targets.shared.rotation import Rotate, Rotation
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceOptions,
    SequenceTarget,
    check_sequence,
    sequence_frame,
    small_linear,
)
from thesean.targets.shared.steps import Steps
from thesean.targets.shared.worth import foretell

WINDOW = KEPT = 64

# Scores to the logarithm of what a token is looked at: within the last one above the least a kept token fades.
_STEEP = 8


class BoundedAttentionOptions(SequenceOptions):
    """Width rule: heads, groups and widths of the guide's attention."""

    window: int = Field(default=WINDOW, gt=0, description="last tokens that are held, whatever their score")
    kept: int = Field(default=KEPT, gt=0, description="older tokens that are held, those that score highest")


class BoundedFrame(SequenceFrame, total=False):
    rotation: list[list[float]] | None
    norm_eps: list[float] | None
    norm_form: NormForm | None


class BoundedAttention(SequenceTarget):
    """y_t = last(softmax_s(scale q_t.k_s) v_s), s over the last W tokens, t's own included, and over the M that score
    highest of all before these; queries and keys normed and turned as the guide does.

    Scores are of each head of keys, a linear map of x that `prepare` solves; those that are kept fade as others come
    near to take their place, see kernels/kept_attention.py. A held token is a row of its key, score, value and a 1.
    x_BTD, (held_BGNX, and with a rotation the count of steps_B) -> (y_BTD, the same).
    Keys are turned by their step, counted from each row's first token.
    """

    family = "bounded-attention"
    reads_mask = True
    saved = ("heads", "key_width", "value_width", "kv_heads", "window", "places", "scale", "rotation", "norm_eps",
             "norm_form")  # fmt: skip

    def __init__(
        self,
        *,
        heads: int,
        key_width: int,
        value_width: int,
        kv_heads: int,
        window: int,
        places: int,
        scale: float,
        **frame: Unpack[BoundedFrame],
    ) -> None:
        rotation = frame.pop("rotation", None)
        norm_eps, norm_form = frame.pop("norm_eps", None), frame.pop("norm_form", None)
        super().__init__(**frame)  # type: ignore[misc]  # what was popped is still in the type
        self.heads, self.kv_heads, self.key_width, self.value_width = heads, kv_heads, key_width, value_width
        self.window, self.places, self.scale = window, places, float(scale)
        self.query = nn.Linear(self.width_in, heads * key_width)
        self.key = nn.Linear(self.width_in, kv_heads * key_width)
        self.value = nn.Linear(self.width_in, kv_heads * value_width)
        self.score = nn.Linear(self.width_in, kv_heads).requires_grad_(False)
        self.rotation, self.norm_eps, self.norm_form = rotation, norm_eps, norm_form
        self.norms = head_norms(key_width, (heads, kv_heads), norm_eps, norm_form)
        self.rotate = None if rotation is None else Rotate(Rotation.of(rotation), key_width)
        self.held = Held(window, places + 1)  # the least fades
        self.last = small_linear(heads * value_width, self.width_out)

    @property
    def row(self) -> int:
        """Columns of a held token."""
        return self.key_width + 1 + self.value_width + 1

    def core_state(self, x: torch.Tensor) -> State:
        held_BGNX = x.new_zeros(x.shape[0], self.kv_heads, self.held.places + self.window, self.row)
        return held_BGNX if self.rotate is None else (held_BGNX, x.new_zeros(x.shape[0], dtype=torch.int64))

    def mix(self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None) -> tuple[torch.Tensor, State | None]:
        held_BGNX, count_B = (state, None) if self.rotate is None else state
        query_BTHC, row_BTGX = self._rows(x_BTD, count_B)
        mean_BTHK, held_BGNX = self.held(query_BTHC, row_BTGX, held_BGNX, steps)
        came = x_BTD.shape[1] if steps is None else steps.count_B
        return mean_BTHK.flatten(-2), held_BGNX if count_B is None else (held_BGNX, count_B + came)

    def _rows(self, x_BTD: torch.Tensor, count_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, scaled, and what is held of each step."""
        query_BTHC, key_BTGC = (f(x_BTD).unflatten(-1, (-1, self.key_width)) for f in (self.query, self.key))
        if len(self.norms):
            query_BTHC, key_BTGC = self.norms[0](query_BTHC), self.norms[1](key_BTGC)
        if self.rotate is not None and count_B is not None:
            step_BT = count_B.unsqueeze(1) + torch.arange(x_BTD.shape[1], device=x_BTD.device)
            tables = self.rotate.tables_at(step_BT, x_BTD)
            query_BTHC, key_BTGC = (self.rotate.turn_by(z, *tables) for z in (query_BTHC, key_BTGC))
        score_BTG1 = self.score(x_BTD).unsqueeze(-1)
        value_BTGk = F.pad(self.value(x_BTD).unflatten(-1, (self.kv_heads, self.value_width)), (0, 1), value=1.0)
        return self.scale * query_BTHC, torch.cat([key_BTGC, score_BTG1, value_BTGk], -1)

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Query, key, value and output projections, and the norms."""
        facts = part.attention
        if facts is None:
            return ()
        key, value = facts.grouped(self.kv_heads)
        pairs = ((self.query, facts.query), (self.key, key), (self.value, value), (self.last, facts.output))
        names = zip(("query", "key", "value", "output"), pairs, strict=True)
        copied = tuple(name for name, (linear, affine) in names if copy_affine(linear, affine))
        copy_norms(self.norms, facts.norms)
        return copied

    def unlike(self, part: PartFacts) -> str:
        facts = part.attention
        if facts is None or facts.plain:
            return ""
        return f"what they hold is not met by the guide's softmax: {facts.differs or 'more than was read off'}"

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

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        linears = (self.query, self.key, self.value, self.score, self.last)
        weights = sum(linear.weight.numel() for linear in linears)
        held = self.window + self.places
        return 2 * part.rows(sizes) * (weights + self.heads * held * (self.key_width + self.value_width + 1))


def check(part: PartFacts, options: BoundedAttentionOptions) -> None:
    """Raises TargetMismatchError where there is no causal attention to take over, or it adds a bias of distance."""
    check_sequence("bounded-attention", part)
    facts = part.attention
    advice = "Choose target 'rnn' or 'linear-attention' for it."
    if facts is None:
        raise part.mismatch(
            "bounded-attention", found="none that could be read", expected="an attention", advice=advice
        )
    if part.mixing == "bidirectional" and not options.causal:
        raise part.mismatch(
            "bounded-attention",
            found="one that reads both ways",
            expected="an attention that reads no later step",
            advice=f"Set causal=True, or: {advice}",
        )
    if options.lookahead and part.mixing == "bidirectional":
        raise part.mismatch("bounded-attention", found="lookahead=", expected="no later steps to read", advice=advice)
    if facts.bias is not None:
        raise part.mismatch(
            "bounded-attention",
            found="a bias of the distance",
            expected="positions that are added before, or turn queries and keys",
            advice=advice,
        )


def build(part: PartFacts, options: BoundedAttentionOptions) -> BoundedAttention:
    facts = part.attention
    assert facts is not None  # checked
    key_width, value_width = facts.widths
    return BoundedAttention(
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        key_width=key_width,
        value_width=value_width,
        window=options.window,
        places=options.kept,
        scale=facts.scale,
        rotation=None if facts.rotation is None else facts.rotation.rows(),
        norm_eps=facts.norm_eps,
        norm_form=facts.norm_form,
        **sequence_frame(part, options),
    )


TARGET = Family(
    name="bounded-attention",
    summary="the guide's softmax over the last tokens and those before that were foretold to matter",
    options=BoundedAttentionOptions,
    module=BoundedAttention,
    build=build,
    scope="mixing",
    check=check,
)
