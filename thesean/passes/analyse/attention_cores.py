"""Find where a graph computes softmax(q k' + mask) v: the fused operator, or two products written out.

B batch, T time, H heads of queries, G heads of keys and values, K head width
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.padding import Padding
from thesean.passes.analyse.sides import BATCH, Sides
from thesean.passes.analyse.softmaxes import SOFTMAX, less_its_largest, sunk_after
from thesean.passes.graph.nodes import argument, owner
from thesean.targets.shared.distance_bias import Reach

aten = torch.ops.aten

_FUSED = aten.scaled_dot_product_attention.default
_PRODUCT = (aten.matmul.default, aten.bmm.default)
ADDED = aten.baddbmm.default  # bias, q, k'
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.unsqueeze.default,
    aten.clone.default, aten.contiguous.default, aten.repeat_interleave.self_int, aten.dropout.default,
    aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.flatten.using_ints,
}  # fmt: skip
_SCALES = {aten.mul.Tensor: False, aten.mul.Scalar: False, aten.div.Tensor: True, aten.div.Scalar: True}


@dataclass(frozen=True, kw_only=True)
class CausalAttention:
    """mixed = softmax(scale query key' + mask) value, (B, H, T, K) each, or (B * `packed`, T, K) where that is not 0.

    Keys and values are those before grouped heads were repeated; a key that is `turned` is (..., K, T). Query t sees
    key s where s <= t, t - s < window, and `padding` shows s. `cap`: c tanh(score / c) stands for the score.
    `distance`: what is added to a score by how many steps lie between, or how many tokens where they are `counted`.
    `sink`: (H), the score of one more key of each head, whose value is zero.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mixed: fx.Node
    turned: bool
    packed: int
    widths: tuple[int, int, int]  # of query, key and value
    dtype: torch.dtype
    device: torch.device
    scale: float
    cap: float | None = None
    window: int | None = None
    padding: Padding | None = None
    distance: Reach | None = None
    counted: bool = False
    sink: torch.Tensor | None = None

    @property
    def sight(self) -> tuple[Any, ...]:
        """Equal for those whose queries see the same keys with the same bias."""
        bias = () if self.distance is None else tuple(t.numpy().tobytes() for t in self.distance)
        return self.window, self.padding, self.dtype, bias, self.counted

    @property
    def path(self) -> str:
        return owner(self.mixed) or self.mixed.name


@dataclass(frozen=True, kw_only=True)
class Scores:
    """From the product of queries and keys to what the softmax reads."""

    product: fx.Node | None  # None: the fused operator's
    steps: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...]  # what enters beside the scores
    causal: bool = False  # the fused operator's own mask
    # the column, last or first, that no key stands for, -1 or 0; or the score that it would have
    sink: int | fx.Node | None = None


def find_cores(sides: Sides) -> Iterator[tuple[CausalAttention, Scores]]:
    """Every attention whose queries and keys are as long, causal or not: nothing is known of its mask yet."""
    finder = _Finder(sides)
    for node in sides.order:
        found = None
        if node.target is _FUSED:
            found = finder.fused(node)
        elif node.target in SOFTMAX:
            found = finder.written_out(node)
        if found is not None:
            yield found


class _Finder:
    def __init__(self, sides: Sides) -> None:
        self.values, self.mains = sides.values, sides.mains

    def fused(self, node: fx.Node) -> tuple[CausalAttention, Scores] | None:
        query, key, value = (argument(node, at, name) for at, name in enumerate(("query", "key", "value")))
        mask = argument(node, 3, "attn_mask")
        shapes = [self.values[n].shape for n in (query, key, value)]
        if any(len(s) != 4 for s in shapes) or argument(node, 4, "dropout_p", 0.0) or shapes[0][2] != shapes[1][2]:
            return None
        scale = argument(node, 6, "scale")
        core = CausalAttention(
            query=query,
            key=key,
            value=value,
            mixed=node,
            turned=False,
            packed=0,
            **self._kinds(query, key, value),
            scale=float(shapes[0][3]) ** -0.5 if scale is None else float(scale),
        )
        causal = bool(argument(node, 5, "is_causal", False))
        return core, Scores(product=None, steps=(), sides=() if mask is None else (mask,), causal=causal)

    def written_out(self, softmax: fx.Node) -> tuple[CausalAttention, Scores] | None:
        """softmax(f(q @ k')) @ v, spelled as separate operators."""
        steps: list[fx.Node] = []
        sides: list[fx.Node] = []
        before, after, capped = 1.0, 1.0, False
        node = softmax.args[0]
        while isinstance(node, fx.Node) and node.target not in (*_PRODUCT, ADDED):
            if (whole := less_its_largest(node)) is not None:  # which a softmax doesn't see
                node = whole
                continue
            steps.append(node)
            mains = [i for i in node.all_input_nodes if i in self.mains]
            if len(mains) != 1:
                return None
            sides += [i for i in node.all_input_nodes if i not in self.mains and self._is_tensor(i)]
            factor = self._factor(node)
            if node.target is aten.tanh.default:
                capped, before, after = True, 1.0, before
            elif factor is not None:
                before *= factor
            node = mains[0]
        rank = self.values[softmax].ndim
        if not isinstance(node, fx.Node) or rank not in (3, 4) or int(argument(softmax, 1, "dim")) % rank != rank - 1:
            return None
        shift = int(node.target is ADDED)
        if shift:
            sides.append(node.all_input_nodes[0])
            before *= float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
        query, key = node.args[shift], node.args[shift + 1]
        product, sink = self._mixing(softmax)
        if product is None or not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
            return None
        value, mixed, score = product.args[1], product, sink
        assert isinstance(value, fx.Node)
        if sink is None and (sunk := sunk_after(product, softmax)) is not None:
            mixed, score = sunk
        shapes = [self.values[n].shape for n in (query, key, value)]
        if len({len(s) for s in shapes}) > 1 or shapes[0][-2] != shapes[1][-1]:
            return None
        packed = 0 if len(shapes[0]) == 4 else shapes[0][0] // BATCH
        core = CausalAttention(
            query=query,
            key=key,
            value=value,
            mixed=mixed,
            turned=True,
            packed=packed,
            **self._kinds(query, key, value),
            scale=before * (after if capped else 1.0),
            cap=after if capped else None,
        )
        return core, Scores(product=node, steps=tuple(reversed(steps)), sides=tuple(sides), sink=score)

    def _kinds(self, query: fx.Node, key: fx.Node, value: fx.Node) -> dict[str, Any]:
        like = self.values[query]
        width = like.shape[-1]
        return {"widths": (width, width, self.values[value].shape[-1]), "dtype": like.dtype, "device": like.device}

    def _factor(self, node: fx.Node) -> float | None:
        """What a step multiplies the scores by, where it does no more than that."""
        if node.target not in _SCALES:
            return None
        other = argument(node, 1, "other")
        if isinstance(other, fx.Node):
            value = self.values[other]
            if other in self.mains or not isinstance(value, (torch.Tensor, int, float)):
                return None
            if isinstance(value, torch.Tensor) and value.numel() != 1:
                return None
            other = float(value)
        return 1 / float(other) if _SCALES[node.target] else float(other)

    def _mixing(self, softmax: fx.Node) -> tuple[fx.Node | None, int | fx.Node | None]:
        """The product of the weights with the values, and which column of the weights is left out before it."""
        node: fx.Node = softmax
        sink: int | None = None
        while True:
            users = [u for u in node.users if u.target in VIEWS or (u.target in _PRODUCT and u.args[0] is node)]
            left_out = [(u, at) for u in node.users if (at := self._left_out(u)) is not None]
            if len(users) + len(left_out) != 1:
                return None, None
            if left_out:
                ((node, sink),) = left_out
                continue
            node = users[0]
            if node.target in _PRODUCT:
                return node, sink

    def _left_out(self, node: fx.Node) -> int | None:
        """-1 or 0 where all but the last or the first column are taken."""
        if node.target is not aten.slice.Tensor:
            return None
        before, after = (self.values[n].shape for n in (node.args[0], node))  # type: ignore[index]
        if after[:-1] != before[:-1] or after[-1] != before[-1] - 1:
            return None
        return -1 if argument(node, 2, "start") in (None, 0) else 0

    def _is_tensor(self, node: fx.Node) -> bool:
        return isinstance(self.values[node], torch.Tensor) and self.values[node].numel() > 1
