"""Linear attention beside whatever else a module's last layer reads: the guide's heads, and the values of late tokens.

Positions: a guide that adds positions to its embeddings passes them on in x. A rotary one turns queries and keys after
they were projected: so does the window, where their distance is all that counts, so that its rows can be counted from
its own start and no state is needed. The linear part meets them as they were: softmax features of a turned key are no
function of the distance, and with or without it is the same within 0.002 nats. A bias of distance is added in the
window; one that falls along a line (ALiBi) is what a decay is, and heads forget as fast as it says.

B batch, T time, D width of the part, H heads of queries, G heads of keys and values (H / G queries in a row share one),
C width of a head's query and key, F = 2C features, K width of a value, k = K + 1, W tokens in the window, N sinks, P
taps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import nn
from torch.nn import functional as F

from thesean.kernels.linear_attention import full_linear_attention
from thesean.targets.shared.copying import copy_affine
from thesean.targets.shared.core import Core
from thesean.targets.shared.distance_bias import LearntReach, seen_from
from thesean.targets.shared.facts import Affine, AttentionFacts, NormFacts, PartFacts
from thesean.targets.shared.head_norm import copy_norms, head_norms
from thesean.targets.shared.heads import MEMORY, SHARPNESS, HeadsFrame
from thesean.targets.shared.lookahead import Late
from thesean.targets.shared.memory import decay_bias, span, spread
from thesean.targets.shared.module import State
from thesean.targets.shared.rotation import Rotate, Rotation
from thesean.targets.shared.sequence import SequenceTarget, SmallLinear
from thesean.targets.shared.signed_softmax import features, signed_softmax
from thesean.targets.shared.steps import Steps, hide
from thesean.targets.shared.taps import Taps
from thesean.targets.shared.window import Window

# guards the division where sharp features of a query meet none of the keys so far
EPSILON = 1e-6


class LinearHeads(SequenceTarget):
    """mean_t = sum_s w_ts v_s / sum_s w_ts of each head, and the taps, as targets/linear_attention.py tells: its base
    and that of what has more features.

    x_BTD, state -> (features_BTE, state), E = H K for the means and P G K for the values of the steps around. `beside`:
    how many features a subclass adds to them in front of `last`.
    """

    reads_mask = True
    looks_ahead = True
    saved: ClassVar[tuple[str, ...]] = (
        "heads", "key_width", "value_width", "kv_heads", "scale", "rotation", "norm_eps", "norm_form",
        "bias", "memory", "sharpness",
    )  # fmt: skip

    def __init__(
        self,
        *,
        heads: int,
        key_width: int,
        value_width: int,
        kv_heads: int | None = None,
        window: int | None = None,
        scale: float | None = None,
        memory: tuple[float, float] = MEMORY,
        sharpness: float = SHARPNESS,
        **frame: Unpack[HeadsFrame],
    ) -> None:
        rotation, norm_eps = frame.pop("rotation", None), frame.pop("norm_eps", None)
        norm_form, bias, sinks = frame.pop("norm_form", None), frame.pop("bias", None), frame.pop("sinks", 0)
        taps, tapped, beside = frame.pop("taps", 0), frame.pop("tapped", "values"), frame.pop("beside", 0)
        super().__init__(**frame)  # type: ignore[misc]  # what was popped is still in the type
        self.memory = span(memory)
        self.sharpness = float(sharpness)
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.key_width = key_width
        self.value_width = value_width
        self.scale = key_width**-0.5 if scale is None else float(scale)
        self.query = nn.Linear(self.width_in, heads * key_width)
        self.key = nn.Linear(self.width_in, self.kv_heads * key_width)
        self.value = nn.Linear(self.width_in, self.kv_heads * value_width)
        self.map_query_HCC = nn.Parameter(torch.eye(key_width).repeat(heads, 1, 1))
        self.map_key_GCC = nn.Parameter(torch.eye(key_width).repeat(self.kv_heads, 1, 1))
        self.decay = None if self.bidirectional else nn.Linear(self.width_in, self.kv_heads)
        self.core = Core("linear_attention")
        self.rotation = rotation
        self.norm_eps, self.norm_form = norm_eps, norm_form
        self.norms = head_norms(key_width, (heads, self.kv_heads), norm_eps, norm_form)
        self.window, self.bias = None, bias
        if window is not None:
            rotate = None if rotation is None else Rotate(Rotation.of(rotation), key_width)
            reach = None if bias is None else LearntReach(heads, *bias)
            self.window = Window(
                size=window, heads=heads, scale=self.scale, rotate=rotate, sinks=sinks, bias=reach, ahead=self.lookahead
            )
        self.taps = Taps(count=taps, both_ways=self.bidirectional, ahead=self.lookahead) if taps else None
        self.tapped = tapped
        self.last = SmallLinear(self.mixed_width + beside, self.width_out)
        self.reset_projections()

    @property
    def mixed_width(self) -> int:
        """Features of heads and taps."""
        taps = 0 if self.taps is None else self.taps.places * self.tap_width
        return self.heads * self.value_width + taps

    @property
    def tap_width(self) -> int:
        return self.width_in if self.tapped == "inputs" else self.kv_heads * self.value_width

    @torch.no_grad()
    def reset_projections(self) -> None:
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=self.width_in**-0.5)
            nn.init.zeros_(linear.bias)
        if self.decay is not None:
            # the same for every token until training says else
            nn.init.zeros_(self.decay.weight)
            middle = torch.tensor([math.prod(self.memory) ** 0.5])  # what a single head gets
            tokens_G = spread(self.memory, self.kv_heads) if self.kv_heads > 1 else middle
            self.decay.bias.copy_(decay_bias(tokens_G))

    def config(self) -> dict[str, Any]:
        window = self.window
        sinks = 0 if window is None or window.sinks is None else window.sinks.size
        given = {"window": None if window is None else window.size, "sinks": sinks}
        taps = {} if self.taps is None else {"taps": self.taps.count, "tapped": self.tapped}
        return {**super().config(), **given, **taps}

    def core_state(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        widths = (self.key_width, self.value_width + 1)
        held: tuple[torch.Tensor, ...] = (x.new_zeros(x.shape[0], self.kv_heads, 2 * widths[0], widths[1]),)
        if self.window is not None:
            held = self.window.initial_state(x, self.kv_heads, widths)
        if self.taps is not None:
            held += self.taps.initial_state(x, self.tap_width)
        return held if len(held) > 1 else held[0]

    def folded(self, linear: nn.Linear, map_HCC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W folded into a projection, its weight and bias: one small product of weights instead of one a token, and a
        constant in ONNX.
        """
        weight_HCD = map_HCC @ linear.weight.unflatten(0, (len(map_HCC), self.key_width))
        bias_HC = (map_HCC @ linear.bias.view(len(map_HCC), self.key_width, 1)).squeeze(-1)
        return weight_HCD.flatten(0, 1), bias_HC.flatten()

    def phi(self, x_BTD: torch.Tensor, own_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax([Wx, -Wx]) of queries and keys per head, (B, T, H, F) and (B, T, G, F)."""
        query, key = self.folded(self.query, self.map_query_HCC), self.folded(self.key, self.map_key_GCC)
        if own_BTD is not x_BTD:
            projected = torch.cat([F.linear(own_BTD, *query), F.linear(x_BTD, *key)], -1)
        else:
            projected = F.linear(x_BTD, *(torch.cat(both) for both in zip(query, key, strict=True)))
        both = signed_softmax(projected.unflatten(-1, (-1, self.key_width)))
        query_BTHF, key_BTGF = both.split([self.heads, self.kv_heads], 2)
        return query_BTHF, key_BTGF

    def projected(
        self, x_BTD: torch.Tensor, own_BTD: torch.Tensor, steps: Steps | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The guide's query_BTHC, and new_BTGX: its key_BTGC and value_BTGk with its column of ones. Zero where no
        token is, the column of ones too, so that whatever the key is does not count.
        """
        query = self.query(own_BTD).unflatten(-1, (-1, self.key_width))
        if not len(self.norms):
            return query, hide(self._by_head(x_BTD, self.key, self.value), steps)
        key = self.norms[1](self.key(x_BTD).unflatten(-1, (-1, self.key_width)))
        return self.norms[0](query), hide(torch.cat([key, self._by_head(x_BTD, self.value)], -1), steps)

    def _by_head(self, x_BTD: torch.Tensor, *linears: nn.Linear) -> torch.Tensor:
        """What these give and a column of ones, side by side in each head: one projection, whose last row reads nothing
        and has a bias of 1.
        """
        weight_GXD = torch.cat([linear.weight.unflatten(0, (self.kv_heads, -1)) for linear in linears], 1)
        bias_GX = torch.cat([linear.bias.unflatten(0, (self.kv_heads, -1)) for linear in linears], 1)
        weight_GXD, bias_GX = F.pad(weight_GXD, (0, 0, 0, 1)), F.pad(bias_GX, (0, 1), value=1.0)
        return F.linear(x_BTD, weight_GXD.flatten(0, 1), bias_GX.flatten()).unflatten(-1, (self.kv_heads, -1))

    def mix(
        self, x_BTD: torch.Tensor, state: Any, steps: Steps | None = None, late: Late | None = None
    ) -> tuple[torch.Tensor, State | None]:
        return self.attend(x_BTD, x_BTD if late is None else late(x_BTD), state, steps)

    def attend(
        self, x_BTD: torch.Tensor, own_BTD: torch.Tensor, state: Any, steps: Steps | None
    ) -> tuple[torch.Tensor, State | None]:
        """`own_BTD`: the steps whose queries read what is held by now."""
        if self.taps is None:
            return self._heads(x_BTD, own_BTD, state, steps)
        held = state if isinstance(state, tuple) else (state,)
        core, past = (held[:-1], held[-1:]) if self.taps.carries else (held, ())
        given = core if len(core) > 1 else core[0]
        mean_BTE, after = self._heads(x_BTD, own_BTD, given, steps)
        tapped_BTV = x_BTD if self.tapped == "inputs" else self.value(x_BTD)
        tapped_BTE, past = self.taps(hide(tapped_BTV, steps), past, steps)
        if past:
            after = (*(after if isinstance(after, tuple) else (after,)), *past)
        return torch.cat([mean_BTE, tapped_BTE], -1), after

    def late(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What the taps are at each step of whole sequences."""
        assert self.taps is not None
        tapped_BTV = x_BTD if self.tapped == "inputs" else self.value(x_BTD)
        tapped_BTV = F.pad(tapped_BTV, (0, 0, 0, self.lookahead))
        tapped_BTE, _ = self.taps(tapped_BTV, self.taps.initial_state(x_BTD, self.tap_width))
        return tapped_BTE[:, self.lookahead :]

    def _heads(
        self, x_BTD: torch.Tensor, own_BTD: torch.Tensor, state: Any, steps: Steps | None
    ) -> tuple[torch.Tensor, State | None]:
        """mean_BT(H K) and the state without that of the taps."""
        log_decay_BTG = None if self.decay is None else hide(self._log_decay(x_BTD), steps)
        if self.window is not None and log_decay_BTG is not None:
            query_BTHC, new_BTGX = self.projected(x_BTD, own_BTD, steps)
            maps = (self.map_query_HCC, self.map_key_GCC)
            mean_BTHK, state = self.window(query_BTHC, new_BTGX, log_decay_BTG, maps, state, steps)
            return mean_BTHK.flatten(-2), state
        if len(self.norms):  # between a projection and its map: nothing can be folded
            query_BTHC, new_BTGX = self.projected(x_BTD, own_BTD, steps)
            key_BTGC, value_BTGk = new_BTGX.split([self.key_width, self.value_width + 1], -1)
            query_BTHF, key_BTGF = features(query_BTHC, self.map_query_HCC), features(key_BTGC, self.map_key_GCC)
        else:
            query_BTHF, key_BTGF = self.phi(x_BTD, own_BTD)
            value_BTGk = hide(self._by_head(x_BTD, self.value), steps)
        if log_decay_BTG is None or state is None:
            out_BTHk = full_linear_attention(query_BTHF, key_BTGF, value_BTGk)
        else:
            out_BTHk, state = self.core(query_BTHF, key_BTGF, value_BTGk, log_decay_BTG, state)
        mean_BTHK = out_BTHk[..., :-1] / (out_BTHk[..., -1:] + EPSILON)
        return mean_BTHK.flatten(-2), state

    def _log_decay(self, x_BTD: torch.Tensor) -> torch.Tensor:
        assert self.decay is not None
        return -F.softplus(self.decay(x_BTD))

    def attention_of(self, part: PartFacts) -> AttentionFacts | None:
        """What the heads are taken from."""
        return part.attention

    @torch.no_grad()
    def copy_from(self, part: PartFacts) -> tuple[str, ...]:
        """Query, key, value and output projections, each where its shape fits (all, unless options changed widths)."""
        facts = self.attention_of(part)
        return () if facts is None else self.copy_heads(facts)

    @torch.no_grad()
    def copy_heads(self, facts: AttentionFacts, norm: NormFacts | None = None) -> tuple[str, ...]:
        """`norm`: whose weight and bias the projections take in, for the heads read what it gives before them."""
        if facts.heads != self.heads:
            return ()
        copied = []
        fits = self.kv_heads % facts.kv_heads == 0  # a guide's group can be split, but not joined with another
        key, value = facts.grouped(self.kv_heads) if fits else (facts.key, facts.value)
        for name, linear, affine in (
            ("query", self.query, facts.query), ("key", self.key, key), ("value", self.value, value),
        ):  # fmt: skip
            if copy_affine(linear, affine if norm is None else norm.fold(affine)):
                copied.append(name)
        if self.copy_output(facts.output, 0):
            self.last.bias.copy_(facts.output.bias_O)
            copied.append("output")
        if "query" in copied and "key" in copied:
            copy_norms(self.norms, facts.norms)
            if self.window is not None and self.window.bias is not None and facts.bias is not None:
                self.window.bias.copy_from(seen_from(facts.bias, self.lookahead))
            if self.decay is not None and facts.bias is not None:
                self._forget(facts.bias.behind.slope_H, self.decay)
            # phi knows no scale: a guide that divides q.k by something else than sqrt(C) gets the rest in both maps
            gain = self.sharpness * (facts.scale * self.key_width**0.5) ** 0.5
            eye_CC = torch.eye(self.key_width, device=self.map_query_HCC.device)
            self.map_query_HCC.copy_(gain * eye_CC)
            self.map_key_GCC.copy_(gain * eye_CC)
        return tuple(copied)

    @torch.no_grad()
    def copy_output(self, affine: Affine, start: int) -> bool:
        """The weights of the features from `start` on, where as many outputs read what these features are; whether
        they do. The other features' weights vanish with the first.
        """
        rows, columns = affine.weight_OI.shape
        wanted = self.heads * self.value_width if start == 0 else self.last.in_features - start
        if (rows, columns) != (self.width_out, wanted):
            return False
        if start == 0:
            self.last.weight.zero_()
        self.last.weight[:, start : start + columns].copy_(affine.weight_OI)
        return True

    def unlike(self, part: PartFacts) -> str:
        """A window is the guide's own softmax only where all is known that goes into it. Positions that weren't read
        are nowhere in it.
        """
        facts = self.attention_of(part)
        if part.turned_unread:
            inside = "" if self.window is None else ", in their window too"
            return (
                "queries and keys are turned by their positions in a way that is not read off; what stands for them "
                f"leaves positions out{inside}"
            )
        if self.window is None or (facts is not None and facts.plain):
            return ""
        found = "no attention was read off" if facts is None else facts.differs
        return f"their window is not the guide's softmax: {found or 'more than was read off'}"

    def kept(self) -> str:
        if self.window is None:
            return ""
        first = "" if self.window.sinks is None else f" and the first {self.window.sinks.size}"
        next_ = "" if not self.lookahead else f", the {self.lookahead} after"
        return f"the last {self.window.size - self.lookahead} tokens{next_}{first} keep their softmax (window=, sinks=)"

    def _forget(self, slope_H: torch.Tensor, decay: nn.Linear) -> None:
        """A bias that falls by m a step is a memory of 1 / m tokens; one that doesn't fall says nothing of it."""
        slope_G = slope_H.to(decay.bias).view(self.kv_heads, -1).mean(1)
        falls_G = slope_G < 0
        decay.bias[falls_G] = decay_bias(-1 / slope_G[falls_G])

    @torch.no_grad()
    def prepare(self, part: PartFacts, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Balance the window and what is older, head by head, as softmax attention over the example would."""
        if self.window is None:
            return
        looked = []
        for x_BTD, _ in examples:
            x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
            if x_BTD.shape[1] <= self.window.size:
                continue
            own_BTD = F.pad(x_BTD, (0, 0, self.lookahead, 0))[:, : x_BTD.shape[1]]
            query_BTHC, new_BTGX = self.projected(x_BTD, own_BTD)
            linear, held_BGMX = self.core_state(x_BTD)[:2]
            first_BNGX, past_BWGX = held_BGMX.transpose(1, 2).split([self.window.places, self.window.size], 1)
            _, left_BTGX, _ = self.window.slide(past_BWGX, new_BTGX)
            maps, log_decay_BTG = (self.map_query_HCC, self.map_key_GCC), self._log_decay(x_BTD)
            older_BTHk, _, sinks, _ = self.window.older(
                query_BTHC, left_BTGX, log_decay_BTG, maps, (linear, first_BNGX)
            )
            key_BTGC, value_BTGk = new_BTGX.split([self.key_width, self.value_width + 1], -1)
            looked.append(self.window.look((query_BTHC, key_BTGC, value_BTGk), older_BTHk, sinks))
        self.window.balance(looked)

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        linears = (self.query, self.key, self.value, self.last, *((self.decay,) if self.decay is not None else ()))
        weights = sum(linear.weight.numel() for linear in linears)
        state = 2 * self.key_width * (self.value_width + 1)
        work = weights + (self.kv_heads + self.heads) * state  # k v^T into the state, q out of it
        if self.window is not None or len(self.norms):  # elsewhere folded into the projections
            work += self.map_query_HCC.numel() + self.map_key_GCC.numel()
        if self.window is not None:
            near = self.window.size + (0 if self.window.sinks is None else self.window.sinks.size)
            work += self.heads * near * (self.key_width + self.value_width + 1)
        return 2 * part.rows(sizes) * work
