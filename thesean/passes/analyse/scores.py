"""Where softmax(scale q k' + bias) v stands in a region, and its scale and bias, as numbers.

Fused or written out, with products of any layout: matmul, bmm, baddbmm, einsum. What happens between the product and
the softmax is not followed operator by operator: the scores of a zero query are what is added, and those of a small
query tell the scale.

B batch, T time, H heads, C width of a head's query and key
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from thesean.passes.analyse.affine_maps import between
from thesean.passes.analyse.distance_bias import LOW, at_length, find_distance_bias, has_lengths
from thesean.passes.analyse.regions import VIEWS, Region
from thesean.passes.analyse.softmaxes import SOFTMAX, less_its_largest, sunk_after
from thesean.passes.graph.nodes import argument
from thesean.passes.graph.record import evaluate
from thesean.targets.shared.distance_bias import DistanceBias

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)

# Of the largest score: fp32 sums differ by 1e-6, a soft cap by 1e-2.
_EXACT = 1e-4
_MORE = "a bias on the scores that is no matter of distance alone"
_SUNK = "a sink among the scores, which takes its share of the weights"
_ODD = "scores that aren't one of each query and key"
# A query as small as this is within the straight part of any cap.
_SMALL = 1e-2


class Operand(NamedTuple):
    """A node of four dimensions, and their order as (B, H, T, C)."""

    node: fx.Node
    order: tuple[int, ...] = (0, 1, 2, 3)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        return value.permute(self.order)


class Core(NamedTuple):
    """`mixed` holds softmax(..) v with four dimensions, `added` the scores as the softmax takes them, or a fused mask;
    `fused` is the operator that does it all. `sunk`: what is mixed has given a share to a sink.
    """

    query: Operand
    key: Operand
    value: Operand
    mixed: fx.Node
    added: fx.Node | None
    fused: fx.Node | None
    sunk: bool = False


class Scores(NamedTuple):
    """What the softmax takes is scale q k' + bias, and `differs` says what else; "" for nothing."""

    scale: float
    bias: DistanceBias | None = None
    differs: str = ""


def find_core(region: Region, values: Mapping[fx.Node, Any]) -> Core | None:
    """The only attention in the region."""
    sunk = None
    fused = [n for n in region.nodes if n.target is aten.scaled_dot_product_attention.default]
    soft = [n for n in region.nodes if n.target in SOFTMAX]
    if len(fused) == 1:
        operator, added = fused[0], argument(fused[0], 3, "attn_mask")
        factors = [(argument(operator, at, name), "bhtc") for at, name in enumerate(("query", "key", "value"))]
        after = operator
    elif len(soft) == 1:
        read: Any = soft[0].args[0]
        operator, added = None, less_its_largest(read) or read
        inside = set(region.nodes)
        before, product = _before(soft[0], inside), _after(soft[0], inside)
        if before is None or product is None:
            return None
        factors, after = [*_query_and_key(before), _values(product)], product
        if (sunk := sunk_after(product, soft[0])) is not None:
            after, _ = sunk
    else:
        return None
    operands = [_operand(*factor, region, values) for factor in factors]
    mixed = view_below(after, region, lambda node: values[node].ndim == 4)
    if mixed is None or any(o is None for o in operands):
        return None
    return Core(*operands, mixed, added, operator, sunk is not None)  # type: ignore[arg-type, call-arg]


def operands_of(operator: fx.Node, inside: Container[fx.Node]) -> list[fx.Node] | None:
    """Query, key and value of the attention that a softmax or the fused operator is, whatever their dimensions; None
    where it is none, or what it reads isn't `inside`.
    """
    if operator.target is aten.scaled_dot_product_attention.default:
        found = [argument(operator, at, name) for at, name in enumerate(("query", "key", "value"))]
    else:
        before, product = _before(operator, inside), _after(operator, inside)
        if before is None or product is None:
            return None
        found = [node for node, _ in (*_query_and_key(before), _values(product))]
    return found if all(isinstance(node, fx.Node) and node in inside for node in found) else None


def read_scores(region: Region, values: Mapping[fx.Node, Any], core: Core) -> Scores:
    """Scale and bias of an attention; only numbers decide."""
    heads, width = (core.query.of(values[core.query.node]).shape[d] for d in (1, 3))
    differs = ""
    zeroed: tuple[fx.Node, ...] = ()
    if core.fused is not None:
        scale = argument(core.fused, 6, "scale") or 1 / math.sqrt(width)
        if core.added is None:
            return Scores(float(scale))
        added = values[core.added]
    else:
        scale, added, differs = _written_out(region, values, core)
        zeroed = (core.query.node, core.key.node)
    added_HTT = _by_head(added, heads)
    if added_HTT is None:
        return Scores(scale, None, differs or _MORE)

    def longer(length: int) -> torch.Tensor | None:
        found = at_length(core.added, zeroed, values, length) if core.added is not None else None
        return None if found is None else _by_head(found, heads)

    bias = find_distance_bias(added_HTT, longer if has_lengths(core.query.node) else None)
    if bias is None:
        return Scores(scale, None, differs or _MORE)
    return Scores(float(scale), None if bias.is_nothing() else bias, differs)


def _written_out(region: Region, values: Any, core: Core) -> tuple[float, torch.Tensor, str]:
    """(scale, what a zero query is given as scores, how scores are bent)."""
    assert core.added is not None
    end: fx.Node = core.added
    template, key_BHTC = values[core.query.node], core.key.of(values[core.key.node])
    run = between(region, [core.query.node], end)
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(template.shape, generator=generator).to(template)

    def scores(query: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = evaluate(run, values, {core.query.node: query}, end)
        return found

    added = scores(torch.zeros_like(q))
    product_BHTT = core.query.of(q) @ key_BHTC.mT
    sunk = _SUNK if core.sunk else ""
    if added.shape[-1] == product_BHTT.shape[-1] + 1:
        keys, sunk = _without_sink(added, scores(q)), _SUNK
        added, scores = keys(added), lambda query, whole=scores: keys(whole(query))  # type: ignore[misc]
    if added.numel() != product_BHTT.numel():
        return 1.0, added, _ODD
    seen, product = added > LOW, product_BHTT.reshape(added.shape)
    small, large = (((scores(s * q) - added) / s)[seen] for s in (_SMALL, 1e2))
    wanted = product[seen]
    scale = _slope(small, wanted)
    if bool((large - scale * wanted).abs().max() > _EXACT * (scale * wanted).abs().max()):
        return scale, added, "a cap on the scores"
    return _slope(large, wanted), added, sunk  # beside which what is added hardly rounds


def _without_sink(added: torch.Tensor, other: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes off the first column or the last one: that which is the same of two queries."""
    first = torch.equal(added[..., 0], other[..., 0])
    return lambda scores: scores[..., 1:] if first else scores[..., :-1]


def _slope(y: torch.Tensor, x: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float((x @ y) / x.square().sum().clamp_min(1e-30))


def _by_head(scores: torch.Tensor, heads: int) -> torch.Tensor | None:
    """(..., T, T), or (..., 1, T) for all queries, as (H, T, T), hidden keys at -inf; None where examples differ."""
    if scores.dtype == torch.bool:
        scores = torch.zeros(scores.shape, device=scores.device).masked_fill(~scores, -torch.inf)
    if scores.ndim >= 2 and scores.shape[-2] == 1:
        scores = scores.expand(*scores.shape[:-2], scores.shape[-1], -1)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[:-2].numel() == 0:
        return None
    rows = scores.reshape(-1, *scores.shape[-2:])
    wide = scores.ndim == 4 and scores.shape[1] == 1  # one for all heads
    per_example = 1 if wide or len(rows) == 1 else heads
    if len(rows) % per_example:
        return None
    examples = rows.view(-1, per_example, *rows.shape[-2:])
    if not bool((examples == examples[:1]).all()):
        return None
    return examples[0].expand(heads, -1, -1)


def _before(softmax: fx.Node, inside: Container[fx.Node]) -> fx.Node | None:
    """The product that the scores come from."""
    node: Any = softmax.args[0]
    while isinstance(node, fx.Node) and node in inside and not _is_product(node):
        if (whole := less_its_largest(node)) is not None:
            node = whole
            continue
        main = [a for a in node.all_input_nodes if a in inside]
        if len(main) != 1:
            return None
        node = main[0]
    return node if isinstance(node, fx.Node) and node in inside else None


def _after(softmax: fx.Node, inside: Container[fx.Node]) -> fx.Node | None:
    """The product that the weights go into."""
    node = softmax
    while not _is_product(node):
        users = [u for u in node.users if u in inside]
        if len(users) != 1:
            return None
        node = users[0]
    return node


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS


def _query_and_key(product: fx.Node) -> list[tuple[Any, str]]:
    """Both factors of the scores, each with its dimensions in letters; "" where they are others."""
    if product.target is not aten.einsum.default:
        first, second = _matrices(product)
        return [(first, "bhtc"), (second, "bhct")]
    (first, one), (second, other), out = _einsum(product)
    named = dict(zip(out, "bhts", strict=False))  # as the softmax needs them
    words = ["".join(named.get(letter, "c") for letter in word) for word in (one, other)]
    if sorted(words[0]) == sorted("bhsc"):
        words, first, second = words[::-1], second, first
    return [(first, words[0]), (second, words[1].replace("s", "t"))]


def _values(product: fx.Node) -> tuple[Any, str]:
    """The factor that the weights are multiplied with."""
    if product.target is not aten.einsum.default:
        return _matrices(product)[1], "bhtc"
    (_, weights), (second, word), _ = _einsum(product)
    named = dict(zip(weights, "bhst", strict=False))
    return second, "".join(named.get(letter, "c") for letter in word)


def _matrices(product: fx.Node) -> tuple[Any, Any]:
    first = 1 if product.target is aten.baddbmm.default else 0
    return argument(product, first, "self"), argument(product, first + 1, "mat2")


def _einsum(product: fx.Node) -> tuple[tuple[Any, str], tuple[Any, str], str]:
    terms, _, out = str(product.args[0]).replace(" ", "").partition("->")
    words, operands = terms.split(","), product.args[1]
    pairs = list(zip(operands, words, strict=True))  # type: ignore[arg-type]
    return pairs[0], pairs[-1], out


def _operand(node: Any, word: str, region: Region, values: Mapping[fx.Node, Any]) -> Operand | None:
    """The factor itself where it has four dimensions, or what it is a view of: (B, H, T, C) of (B H, T, C)."""
    if not isinstance(node, fx.Node) or not isinstance(values[node], torch.Tensor):
        return None
    if values[node].ndim == 4:
        return Operand(node, tuple(word.index(d) for d in "bhtc")) if sorted(word) == sorted("bhtc") else None
    batch = values[region.entry].shape[0]
    flat = values[node].mT if word.endswith("ct") else values[node]
    above = node
    while flat.ndim == 3 and above.target in VIEWS and values[above].ndim == 3 and len(above.all_input_nodes) >= 1:
        above = above.all_input_nodes[0]
    template = values[above]
    if not isinstance(template, torch.Tensor) or template.ndim != 4 or template.shape[0] != batch:
        return None
    for order in ((0, *rest) for rest in itertools.permutations((1, 2, 3))):
        if torch.equal(template.permute(order).flatten(0, 1), flat):
            return Operand(above, order)
    return None


def view_below(node: fx.Node, region: Region, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The node, or the view of it that is wanted, where nothing else reads what lies between."""
    inside = set(region.nodes)
    while not wanted(node):
        users = [u for u in node.users if u in inside and u.target in VIEWS]
        if len(users) != 1 or len(node.users) != 1:
            return None
        node = users[0]
    return node
