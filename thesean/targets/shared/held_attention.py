"""Softmax attention over tokens that are held in one tensor of fixed size, with the guide's own heads: the base of
those that hold the last tokens and some older ones.

B batch, T time, D width of the part, H heads of queries, G heads of keys and values (H / G queries in a row share one),
C width of a head's query and key, K width of a value, W tokens in the window, M tokens that are kept, and one more that
has faded, N = M + 1 + W
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import nn

from thesean.kernels.shared.precision import wide
from thesean.targets.shared.copying import copy_affine
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.head_norm import NormForm, copy_norms, head_norms
from thesean.targets.shared.held import Held, HeldTokens
from thesean.targets.shared.module import State
from thesean.targets.shared.rotation import Rotate, Rotation
from thesean.targets.shared.sequence import (
    SequenceFrame,
    SequenceOptions,
    SequenceTarget,
    SmallLinear,
    check_sequence,
    sequence_frame,
)
from thesean.targets.shared.steps import Steps


class HeldFrame(SequenceFrame, total=False):
    fade: int
    rotation: list[list[float]] | None
    norm_eps: list[float] | None
    norm_form: NormForm | None


class HeldAttention(SequenceTarget):
    """y_t = last(softmax_s(scale q_t.k_s) v_s), s over the last W tokens, t's own included, and over the M that score
    highest of all before these; queries and keys normed and turned as the guide does.

    A subclass says what a token scores. x_BTD, (key_BGNC, value_BGNK, marks_BG2N, and where it `counts` the steps_B so
    far) -> (y_BTD, the same): see shared/held.py. Keys are turned by their step, counted from each row's first token.
    """

    reads_mask = True
    always_counts: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = (
        "heads", "key_width", "value_width", "kv_heads", "window", "places", "scale", "rotation", "norm_eps",
        "norm_form",
    )  # fmt: skip

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
        **frame: Unpack[HeldFrame],
    ) -> None:
        rotation = frame.pop("rotation", None)
        norm_eps, norm_form = frame.pop("norm_eps", None), frame.pop("norm_form", None)
        fade = frame.pop("fade", 0)
        super().__init__(**frame)  # type: ignore[misc]  # what was popped is still in the type
        self.heads, self.kv_heads, self.key_width, self.value_width = heads, kv_heads, key_width, value_width
        self.window, self.places, self.scale, self.fade = window, places, float(scale), fade
        self.query = nn.Linear(self.width_in, heads * key_width)
        self.key = nn.Linear(self.width_in, kv_heads * key_width)
        self.value = nn.Linear(self.width_in, kv_heads * value_width)
        self.rotation, self.norm_eps, self.norm_form = rotation, norm_eps, norm_form
        self.norms = head_norms(key_width, (heads, kv_heads), norm_eps, norm_form)
        self.rotate = None if rotation is None else Rotate(Rotation.of(rotation), key_width)
        self.held = Held(window, places + 1, self.fade, self.scale)  # the least fades
        self.last = SmallLinear(heads * value_width, self.width_out)

    @property
    def counts(self) -> bool:
        """Whether it has to know how many steps there were."""
        return self.always_counts or self.rotate is not None

    def scores(self, x_BTD: torch.Tensor, step_BT: torch.Tensor | None) -> torch.Tensor:
        """What each token scores with each head of keys, (B, T, G); `step_BT` where it counts."""
        raise NotImplementedError(f"{type(self).__name__}.scores")

    def core_state(self, x: torch.Tensor) -> State:
        places = x.shape[0], self.kv_heads, self.held.places + self.window
        key_BGNC, value_BGNK = (x.new_zeros(*places, width) for width in (self.key_width, self.value_width))
        # half precision can't count down what is left of a score
        marks_BG2N = wide(x.new_zeros(*places[:2], 2, places[2]))
        count = (x.new_zeros(x.shape[0], dtype=torch.int64),) if self.counts else ()
        return key_BGNC, value_BGNK, marks_BG2N, *count

    def mix(self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None) -> tuple[torch.Tensor, State | None]:
        held, count_B = HeldTokens(*state[:3]), state[3] if self.counts else None
        mean_BTHK, held = self.held(*self._tokens(x_BTD, count_B), held, steps)
        came = x_BTD.shape[1] if steps is None else steps.count_B
        return mean_BTHK.flatten(-2).to(x_BTD.dtype), (*held, *(() if count_B is None else (count_B + came,)))

    def _tokens(self, x_BTD: torch.Tensor, count_B: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and scores of each step."""
        query_BTHC, key_BTGC = (f(x_BTD).unflatten(-1, (-1, self.key_width)) for f in (self.query, self.key))
        if len(self.norms):
            query_BTHC, key_BTGC = self.norms[0](query_BTHC), self.norms[1](key_BTGC)
        step_BT = None
        if count_B is not None:
            step_BT = count_B.unsqueeze(1) + torch.arange(x_BTD.shape[1], device=x_BTD.device)
        if self.rotate is not None and step_BT is not None:
            tables = self.rotate.tables_at(step_BT, x_BTD)
            query_BTHC, key_BTGC = (self.rotate.turn_by(z, *tables) for z in (query_BTHC, key_BTGC))
        value_BTGK = self.value(x_BTD).unflatten(-1, (self.kv_heads, self.value_width))
        return query_BTHC, key_BTGC, value_BTGK, wide(self.scores(x_BTD, step_BT))

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

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        linears = [m for m in self.children() if isinstance(m, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        held = self.window + self.places
        return 2 * part.rows(sizes) * (weights + self.heads * held * (self.key_width + self.value_width + 1))


def check_held(target: str, part: PartFacts, options: SequenceOptions) -> None:
    """Raises TargetMismatchError where there is no causal attention to take over, or it adds a bias of distance."""
    check_sequence(target, part)
    facts = part.attention
    advice = "Choose target 'rnn' or 'linear-attention' for it."
    if facts is None:
        raise part.mismatch(target, found="none that could be read", expected="an attention", advice=advice)
    if part.mixing == "bidirectional" and not options.causal:
        raise part.mismatch(
            target,
            found="one that reads both ways",
            expected="an attention that reads no later step",
            advice=f"Set causal=True, or: {advice}",
        )
    if options.lookahead and part.mixing == "bidirectional":
        raise part.mismatch(target, found="lookahead=", expected="no later steps to read", advice=advice)
    if facts.bias is not None:
        raise part.mismatch(
            target,
            found="a bias of the distance",
            expected="positions that are added before, or turn queries and keys",
            advice=advice,
        )


def held_frame(part: PartFacts, options: SequenceOptions) -> dict[str, Any]:
    """All of the constructor's arguments but how many tokens are held."""
    facts = part.attention
    assert facts is not None  # checked
    return {"kv_heads": facts.kv_heads, **facts.frame, **sequence_frame(part, options)}
