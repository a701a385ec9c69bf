"""Exact softmax attention with the guide's own heads: the base of those that change how many there are.

B batch, T time, D width of the part, H heads of queries, G heads of keys and values (H / G queries in a row share one),
K head width of queries and keys, V head width of values
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import nn

from thesean.targets.shared.distance_bias import AddedBias, DistanceBias
from thesean.targets.shared.facts import PartFacts, attend
from thesean.targets.shared.head_norm import Meeting, head_norms
from thesean.targets.shared.module import MaskReader, State
from thesean.targets.shared.rotation import Rotate, Rotation


class SoftmaxFrame(Meeting, total=False):
    """How queries and keys meet, how many heads of keys there are, and how wide what they read is."""

    kv_heads: int
    reads: int


class SoftmaxHeads(MaskReader):
    """y = last(concat_h softmax(q_h k_g' scale + bias_h) v_g), g the group of h. x_BTD -> y_BTD.

    It is still an attention: a language model with one decodes with a cache, which an export adds. Keys and values are
    maps of what `read` gives, of width `reads`: the part's input, unless a subclass makes something else of it. `saved`
    names the constructor's arguments that a family has beside.
    """

    reads_mask = True
    remembers_what_it_reads: ClassVar[bool] = False  # narrower than keys and values: an export's cache holds it
    saved: ClassVar[tuple[str, ...]] = ()
    last: nn.Linear

    def __init__(
        self,
        *,
        width_in: int,
        width_out: int,
        heads: int,
        key_width: int,
        value_width: int,
        scale: float,
        causal: bool,
        **frame: Unpack[SoftmaxFrame],
    ) -> None:
        super().__init__()
        rotation, bias, reads = frame.get("rotation"), frame.get("bias"), frame.get("reads") or width_in
        self.width_in, self.width_out = width_in, width_out
        self.heads, self.kv_heads = heads, frame.get("kv_heads") or heads
        self.key_width, self.value_width = key_width, value_width
        self.scale = float(scale)
        self.causal = causal
        self.rotate = None if rotation is None else Rotate(Rotation.of(rotation), self.key_width)
        self.norm_eps, self.norm_form = frame.get("norm_eps"), frame.get("norm_form")
        self.norms = head_norms(self.key_width, (heads, self.kv_heads), self.norm_eps, self.norm_form)
        self.added = None if bias is None else AddedBias(self.heads, bias)
        self.query = nn.Linear(self.width_in, self.heads * self.key_width)
        self.key = nn.Linear(reads, self.kv_heads * self.key_width)
        self.value = nn.Linear(reads, self.kv_heads * self.value_width)
        self.last = nn.Linear(self.heads * self.value_width, self.width_out)

    def config(self) -> dict[str, Any]:
        return {
            "width_in": self.width_in,
            "width_out": self.width_out,
            "heads": self.heads,
            "key_width": self.key_width,
            "value_width": self.value_width,
            "scale": self.scale,
            "causal": self.causal,
            "rotation": None if self.rotate is None else self.rotate.rotation.rows(),
            "norm_eps": self.norm_eps,
            "norm_form": self.norm_form,
            "bias": None if self.added is None else self.added.bias.sizes,
            **{name: getattr(self, name) for name in self.saved},
        }

    @property
    def bias(self) -> DistanceBias | None:
        return None if self.added is None else self.added.bias

    def read(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What key and value are maps of."""
        return x_BTD

    def queries(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Normed, and not turned yet."""
        query_BTHK: torch.Tensor = self.query(x_BTD).unflatten(-1, (self.heads, -1))
        return self.norms[0](query_BTHK) if len(self.norms) else query_BTHK

    def keys(self, read_BTR: torch.Tensor) -> torch.Tensor:
        key_BTGK: torch.Tensor = self.key(read_BTR).unflatten(-1, (self.kv_heads, -1))
        return self.norms[1](key_BTGK) if len(self.norms) else key_BTGK

    def masked_features(
        self, x: torch.Tensor, state: State | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State | None]:
        read_BTR = self.read(x)
        query_BTHK, key_BTGK = self.queries(x), self.keys(read_BTR)
        value_BTGV = self.value(read_BTR).unflatten(-1, (self.kv_heads, -1))
        if self.rotate is not None:
            query_BTHK, key_BTGK = self.rotate(query_BTHK), self.rotate(key_BTGK)
        return attend(query_BTHK, key_BTGK, value_BTGV, self.scale, self.causal, mask, self.bias), None

    def flops(self, part: PartFacts, sizes: dict[str, int]) -> int:
        tokens = part.rows(sizes)
        time = tokens // part.rows(sizes, 1)
        weights = sum(p.numel() for p in self.parameters() if p.ndim >= 2)
        scores = time * self.heads * (self.key_width + self.value_width)
        return 2 * tokens * (weights + scores)


def softmax_frame(part: PartFacts) -> dict[str, Any]:
    """The constructor arguments that say how the guide's queries and keys meet."""
    facts = part.attention
    assert facts is not None  # checked
    return {
        "width_in": part.width_in,
        "width_out": part.width_out,
        "causal": part.mixing == "causal",
        "bias": None if facts.bias is None else facts.bias.sizes,
        **facts.frame,
    }
