"""What a target may know of the part that it replaces: shapes and measured facts.

B batch, T time, D width of the part, H heads, K head width of queries and keys, V of values, W hidden neurons
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from thesean.errors import TargetMismatchError
from thesean.targets.shared.activations import ACTIVATIONS
from thesean.targets.shared.channel_groups import ChannelFacts
from thesean.targets.shared.distance_bias import DistanceBias
from thesean.targets.shared.head_norm import HeadNorm, NormForm
from thesean.targets.shared.rotation import Rotate, Rotation

Dim = int | str
Mixing = Literal["none", "causal", "bidirectional"]


class Affine(NamedTuple):
    """y = x @ weight.T + bias, as in `nn.Linear`."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """y, computed in x's dtype."""
        return F.linear(x, *self.to(x.dtype))

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.weight_OI.to(dtype), self.bias_O.to(dtype))


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """The projections of an attention, read off the graph: all affine in the part's input, per token.

    Head h of the queries is rows h*K..(h+1)*K of `query`; keys and values are repeated to as many heads where the
    guide groups them. `output` maps the concatenated heads to the part's output. `scale` multiplies q.k. Before they
    meet, `norms` are taken of query and key, and `rotation` turns them by their steps; `bias` is added to what comes of
    it. `plain`: the part computes output(softmax(q k' scale + bias) v), causal or over all tokens, with what of this
    there is and nothing else; where it isn't, `differs` says what else.
    """

    heads: int
    scale: float
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    rotation: Rotation | None = None
    norms: tuple[HeadNorm, HeadNorm] | None = None
    bias: DistanceBias | None = None
    plain: bool = False
    differs: str = ""

    @property
    def norm_form(self) -> NormForm | None:
        """Of both norms, as the more demanding one needs it."""
        forms = {norm.form for norm in self.norms or ()}
        return "whole" if "whole" in forms else "heads" if "heads" in forms else None

    @property
    def norm_eps(self) -> list[float] | None:
        """Of the norms of query and key."""
        return None if self.norms is None else [norm.eps for norm in self.norms]

    @property
    def widths(self) -> tuple[int, int]:
        """Of a head's query and key, and of its value."""
        return len(self.query.bias_O) // self.heads, len(self.value.bias_O) // self.heads

    @property
    def frame(self) -> dict[str, Any]:
        """How queries and keys meet, as the constructors of modules that do it alike take it."""
        key_width, value_width = self.widths
        return {
            "heads": self.heads,
            "key_width": key_width,
            "value_width": value_width,
            "scale": self.scale,
            "rotation": None if self.rotation is None else self.rotation.rows(),
            "norm_eps": self.norm_eps,
            "norm_form": self.norm_form,
        }

    @cached_property
    def kv_heads(self) -> int:
        """Heads of keys and values before they were repeated: H / kv_heads queries in a row share one of each."""
        return next(
            count
            for count in range(1, self.heads + 1)
            if self.heads % count == 0 and all(_repeats(a, self.heads, count) for a in (self.key, self.value))
        )

    def grouped(self, count: int) -> tuple[Affine, Affine]:
        """Keys and values of `count` heads, a multiple of `kv_heads` that divides `heads`."""
        key, value = (
            Affine(_by_group(a.weight_OI, self.heads, count)[:, 0].flatten(0, 1),
                   _by_group(a.bias_O, self.heads, count)[:, 0].flatten())
            for a in (self.key, self.value)
        )  # fmt: skip
        return key, value

    def met(self, q_BTHK: torch.Tensor, k_BTHK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was projected as it meets: normed, and turned by the steps from the first on."""
        if self.norms is not None:
            q_BTHK, k_BTHK = self.norms[0].of(q_BTHK), self.norms[1].of(k_BTHK)
        if self.rotation is not None:
            rotate = Rotate(self.rotation, q_BTHK.shape[-1]).to(q_BTHK.device)
            q_BTHK, k_BTHK = rotate(q_BTHK), rotate(k_BTHK)
        return q_BTHK, k_BTHK

    def mixed_values(self, x_BTD: torch.Tensor, causal: bool) -> torch.Tensor:
        """What the output projection reads, (B, T, H V), where the attention is `plain`."""
        q_BTHK, k_BTHK, v_BTHV = (
            affine.of(x_BTD).unflatten(-1, (self.heads, -1)) for affine in (self.query, self.key, self.value)
        )
        q_BTHK, k_BTHK = self.met(q_BTHK, k_BTHK)
        return attend(q_BTHK, k_BTHK, v_BTHV, self.scale, causal, bias=self.bias)


def attend(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    scale: float,
    causal: bool,
    mask_BT: torch.Tensor | None = None,
    bias: DistanceBias | None = None,
) -> torch.Tensor:
    """softmax(q k' scale + bias) v of each head, concatenated: (B, T, H V). `mask_BT` is True at tokens. Where
    there are fewer heads of keys and values, each serves as many queries in a row.
    """
    heads = q_BTHK.shape[2]
    q_BHTK, k_BHTK, v_BHTV = (_to_heads(x.transpose(1, 2), heads) for x in (q_BTHK, k_BTHK, v_BTHV))
    added: torch.Tensor | None = None  # booleans of what is seen, or a number for each score
    time = q_BHTK.shape[2]
    if mask_BT is not None:
        both_TT = torch.ones(time, time, dtype=torch.bool, device=mask_BT.device)
        # each step sees itself, or one before the first token would see nothing and be NaN
        seen_BTT = mask_BT.unsqueeze(1) | (both_TT.tril() & both_TT.triu())
        added = (seen_BTT & both_TT.tril() if causal else seen_BTT).unsqueeze(1)
    elif causal and bias is not None:
        added = torch.ones(time, time, dtype=torch.bool, device=q_BHTK.device).tril()
    if bias is not None:
        bias_HTT = bias.matrix(time, q_BHTK)
        added = bias_HTT.unsqueeze(0) if added is None else torch.where(added, bias_HTT, -torch.inf)
    mixed_BHTV = F.scaled_dot_product_attention(
        q_BHTK, k_BHTK, v_BHTV, attn_mask=added, is_causal=causal and added is None, scale=scale
    )
    return mixed_BHTV.transpose(1, 2).flatten(2)


def _to_heads(x_BGTK: torch.Tensor, heads: int) -> torch.Tensor:
    repeats = heads // x_BGTK.shape[1]
    return x_BGTK if repeats == 1 else x_BGTK.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _by_group(rows: torch.Tensor, heads: int, count: int) -> torch.Tensor:
    """(heads * K, ...) -> (count, heads / count, K, ...)."""
    return rows.unflatten(0, (count, heads // count, len(rows) // heads))


def _repeats(affine: Affine, heads: int, count: int) -> bool:
    """Whether the heads of a group are copies. They are copies of one number, so that equality is exact."""
    grouped = (_by_group(rows, heads, count) for rows in affine)
    return all(torch.equal(g, g[:, :1].expand_as(g)) for g in grouped)


@dataclass(frozen=True, kw_only=True)
class MLPFacts:
    """A token-wise MLP, read off the graph: y = down(act(up(x))), or down(act(gate(x)) * up(x)) where it is gated.

    `activation` is one of `ACTIVATIONS`.
    """

    up: Affine
    down: Affine
    activation: str
    gate: Affine | None = None

    @property
    def width(self) -> int:
        """Hidden neurons."""
        return int(self.up.weight_OI.shape[0])

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The hidden activations, (..., D) -> (..., W)."""
        act, up = ACTIVATIONS[self.activation], self.up.of(x)
        return act(up) if self.gate is None else act(self.gate.of(x)) * up


class CellWeights(NamedTuple):
    """Of one direction of a recurrent cell, the gates in torch's order: G gates, E units, I inputs."""

    input_GEI: torch.Tensor
    hidden_GEE: torch.Tensor
    input_bias_GE: torch.Tensor
    hidden_bias_GE: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CellFacts:
    """A recurrent cell of the guide's own, from zeros on, read off the graph: y = output(cell(x)), or its hidden states
    themselves without an `output`. One set of weights a direction.
    """

    kind: Literal["lstm", "gru", "elman"]
    weights: tuple[CellWeights, ...]
    output: Affine | None = None

    @property
    def units(self) -> int:
        """Of a direction."""
        return int(self.weights[0].hidden_GEE.shape[1])

    def hidden(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """The hidden states, (B, T, E of all directions side by side)."""
        aten, both = torch.ops.aten, len(self.weights) == 2
        params = [w.to(x_BTI.dtype) for weights in self.weights for w in weights]
        zeros = x_BTI.new_zeros(len(self.weights), x_BTI.shape[0], self.units)
        rest = (params, True, 1, 0.0, False, both, True)
        if self.kind == "lstm":
            found: Any = aten.lstm.input(x_BTI, [zeros, zeros], *rest)
        else:
            found = (aten.gru.input if self.kind == "gru" else aten.rnn_tanh.input)(x_BTI, zeros, *rest)
        return torch.as_tensor(found[0])

    def read_by(self, width_out: int) -> Affine:
        """The map of all hidden states that gives the part's output."""
        if self.output is not None:
            return self.output
        like = self.weights[0].hidden_GEE
        return Affine(torch.eye(width_out).to(like), like.new_zeros(width_out))


class NormFacts(NamedTuple):
    """A norm of each token's features, read off the graph: about their mean where it is `centred`, else about zero."""

    weight_D: torch.Tensor
    bias_D: torch.Tensor
    eps: float
    centred: bool

    def of(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.centred:
            weight_D, bias_D = self.weight_D.to(x_BTD.dtype), self.bias_D.to(x_BTD.dtype)
            return F.layer_norm(x_BTD, x_BTD.shape[-1:], weight_D, bias_D, self.eps)
        return HeadNorm(self.weight_D, self.eps, self.bias_D).of(x_BTD)

    @property
    def bare(self) -> NormFacts:
        """Without its weight and bias."""
        return self._replace(weight_D=torch.ones_like(self.weight_D), bias_D=torch.zeros_like(self.bias_D))

    def fold(self, affine: Affine) -> Affine:
        """The map of what the norm gives, as one of what it gives before its weight and bias."""
        weight_OI = affine.weight_OI
        return Affine(weight_OI * self.weight_D.to(weight_OI), affine.bias_O + weight_OI @ self.bias_D.to(weight_OI))


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """A block of one attention and one MLP, each added to the stream, read off the graph.

    Each reads what its norm gives, or the stream itself where there is none. The MLP's stream is the block's input with
    the attention's output added where the two are `in_a_row`, and the block's input where they stand side by side.
    """

    attention: AttentionFacts
    mlp: MLPFacts
    attention_norm: NormFacts | None
    mlp_norm: NormFacts | None
    in_a_row: bool

    def between(self, x_BTD: torch.Tensor, causal: bool) -> torch.Tensor:
        """The stream that the MLP reads, before its norm; without the attention's output where that is not known whole,
        or does not come before.
        """
        if not (self.in_a_row and self.attention.plain):
            return x_BTD
        read_BTD = x_BTD if self.attention_norm is None else self.attention_norm.of(x_BTD)
        return x_BTD + self.attention.output.of(self.attention.mixed_values(read_BTD, causal))


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """All that a target may know of the part that it replaces: shapes and measured facts, never a class name."""

    path: str
    whole: str | None = None  # path of the part of the plan where this is a place inside of it
    input_shape: tuple[Dim, ...]  # a str is a dynamic dimension, "batch" first
    output_shape: tuple[Dim, ...]
    mixing: Mixing  # what the probe saw along the second dimension; "none" is token-wise
    params: int
    attention: AttentionFacts | None = None
    # queries and keys are turned by their steps, and how is not in `attention`
    turned_unread: bool = False
    mlp: MLPFacts | None = None
    cell: CellFacts | None = None
    channels: ChannelFacts | None = None  # where it maps feature maps
    channels_unread: str = ""  # or why they are not known
    block: BlockFacts | None = None  # where the target stands for both
    # The output is what the whole part adds to nothing: no residual stream runs beside it. A replacement of a whole
    # block brings its own skip connection; one of a branch must not.
    is_branch: bool = False
    # (batch, channels, time): a convolution or a norm reads the second dimension as channels
    channels_first: bool = False
    # no output is below zero: the part ends in a relu or the like
    nonnegative: bool = False
    # hidden units, per direction, of the part's own recurrent cells; None where it has none
    recurrent_units: int | None = None

    @property
    def is_sequence(self) -> bool:
        """(batch, time, width) in and out."""
        return len(self.input_shape) == len(self.output_shape) == 3 and not self.channels_first

    @property
    def width_in(self) -> int:
        return int(self.input_shape[-1])

    @property
    def width_out(self) -> int:
        return int(self.output_shape[-1])

    @property
    def features_width(self) -> int:
        """Of what stands for the part, where nothing else is asked for: a recurrence's hidden units, or else the larger
        of its widths, for a narrower one would lose what the part puts out.
        """
        return self.recurrent_units or max(self.width_in, self.width_out)

    def rows(self, sizes: Mapping[str, int], dims: int | None = None) -> int:
        """How often a part's module runs at these sizes of the dynamic dimensions: the product of the input's first
        `dims` dimensions; by default batch and time of a sequence, the batch of anything else.
        """
        leading = self.input_shape[: (-1 if self.is_sequence else 1) if dims is None else dims]
        return math.prod(sizes[dim] if isinstance(dim, str) else dim for dim in leading)

    @property
    def keep(self) -> str:
        """What leaves it to the guide: all of the part, since a plan keeps no place inside of one."""
        return f"keep=[{self.whole or self.path!r}]"

    def mismatch(self, target: str, found: str, expected: str, advice: str) -> TargetMismatchError:
        return TargetMismatchError(f"{self.path}: target {target!r} expected {expected}, found {found}. {advice}")
