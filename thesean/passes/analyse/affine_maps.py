"""Run a region on rows of features of one's own, and read token-wise affine maps off it.

N tokens of the recording, M rows, I inputs, O outputs
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.regions import Region
from thesean.passes.graph.record import Recorded, evaluate_all
from thesean.targets.shared.facts import Affine

Values = Mapping[fx.Node, Any]

# Of the largest output: fp32 sums of some thousand terms in another order differ by 1e-6, any activation by 1e-2.
_EXACT = 1e-5

# Rows of each of the three kinds that `probe_rows` makes: a map that is not additive shows on one.
_PROBES = 4


def tokens_of(value: Any) -> int:
    """How many rows of features a value holds: all dimensions but the last."""
    return math.prod(value.shape[:-1])


def between(region: Region, starts: Sequence[fx.Node], end: fx.Node) -> list[fx.Node]:
    """The region's nodes after any of `starts` and up to `end`: all that a probe must run."""
    after: set[fx.Node] = set()
    for node in region.nodes:
        if any(i in after or i in starts for i in node.all_input_nodes):
            after.add(node)
    before = {end}
    for node in reversed(region.nodes):
        if any(user in before for user in node.users):
            before.add(node)
    return [n for n in region.nodes if n in after and n in before and n not in starts]


@torch.no_grad()
def run_rows(
    nodes: Sequence[fx.Node], values: Values, given: Mapping[fx.Node, torch.Tensor]
) -> dict[fx.Node, torch.Tensor]:
    """Every node's value, one row a token, when the `given` nodes hold these rows (all as many), in as many runs as
    the recording's number of tokens asks for. Values that are not one row a token are left out.
    """
    tokens = tokens_of(values[next(iter(given))])
    count = len(next(iter(given.values())))
    runs: list[dict[fx.Node, torch.Tensor]] = []
    for start in range(0, count, tokens):
        filled = {
            node: torch.nn.functional.pad(chunk, (0, 0, 0, tokens - len(chunk))).view(values[node].shape)
            for node, chunk in ((node, rows[start : start + tokens]) for node, rows in given.items())
        }
        found = evaluate_all(nodes, values, filled)
        runs.append({n: v.reshape(tokens, -1) for n, v in found.items() if _one_row_a_token(v, tokens)})
    return {n: torch.cat([run[n] for run in runs])[:count] for n in runs[0]}


def _one_row_a_token(value: Any, tokens: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 2 and tokens_of(value) == tokens


def probe_rows(value: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Rows that tell an affine map from others: 0, then a, b and a + b for some random a and b. (M, I).

    Three times as large as what was recorded, so that both sides of a bend are met. `width` where it is not the last
    dimension alone.
    """
    generator = torch.Generator().manual_seed(3)
    width = width or value.shape[-1]
    a, b = (torch.randn(_PROBES, width, generator=generator).to(value) for _ in range(2))
    scale = 3 * value.std().clamp_min(1e-3)
    return torch.cat([value.new_zeros(1, width), scale * a, scale * b, scale * (a + b)])


def is_affine(y_MO: torch.Tensor) -> bool:
    """f(a + b) - f(0) = f(a) - f(0) + f(b) - f(0), for the values y of `probe_rows`; comparisons are no maps."""
    if not y_MO.is_floating_point():
        return False
    linear_MO = y_MO[1:] - y_MO[0]
    a, b, both = linear_MO.split(_PROBES)
    return bool((both - a - b).abs().max() <= 10 * _EXACT * y_MO.abs().max().clamp_min(1e-30))


@torch.no_grad()
def read_affine(
    nodes: Sequence[fx.Node],
    values: Values,
    source: fx.Node,
    wanted: fx.Node,
    x_MI: torch.Tensor,
    y_MO: torch.Tensor,
) -> Affine | None:
    """`wanted` as an affine map of `source`, each token by itself; `y_MO` are its values on `probe_rows`. None where
    there is none.

    A weight of the guide that does it, whole, transposed, or one of several packed into one, is shared and not copied.
    Else the map is probed with basis vectors, which takes O(I) runs.
    """
    if not is_affine(y_MO):
        return None
    shared = match_weight(nodes, values, x_MI, y_MO)
    if shared is not None:
        return shared
    basis_II = torch.eye(x_MI.shape[1]).to(x_MI)
    columns_IO = run_rows(nodes, values, {source: basis_II})[wanted] - y_MO[0]
    error_MO = x_MI[1:] @ columns_IO + y_MO[0] - y_MO[1:]
    if error_MO.abs().max() > 10 * _EXACT * y_MO.abs().max().clamp_min(1e-30):
        return None
    return Affine(columns_IO.T.contiguous(), y_MO[0].clone())


@torch.no_grad()
def match_weight(nodes: Sequence[fx.Node], values: Values, x_MI: torch.Tensor, y_MO: torch.Tensor) -> Affine | None:
    """The weight among the side inputs of `nodes` that maps `probe_rows` x to y, up to a factor; None without one."""
    bias_O, linear_MO = y_MO[0], y_MO[1:] - y_MO[0]
    for weight_OI, stored_OI in _candidates(nodes, values, x_MI.shape[1], y_MO.shape[1]):
        product_MO = x_MI[1:] @ weight_OI.T
        factor = float((product_MO * linear_MO).sum() / product_MO.square().sum().clamp_min(1e-30))
        if abs(factor - 1) < _EXACT:
            factor = 1.0
        if (factor * product_MO - linear_MO).abs().max() <= _EXACT * y_MO.abs().max().clamp_min(1e-30):
            return Affine(stored_OI if factor == 1.0 else factor * weight_OI, bias_O.clone())
    return None


def _candidates(
    nodes: Sequence[fx.Node], values: Values, width_in: int, width_out: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Matrices (O, I) among the side inputs of `nodes`: whole, transposed, and the blocks of packed ones; each as the
    probe computes with it, and as the guide has it.
    """
    inside = set(nodes)
    sides = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside)
    for side in sides:
        value = values[side]
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or not value.is_floating_point():
            continue
        stored = values.stored(side) if isinstance(values, Recorded) else value
        for matrix, own in ((value.detach(), stored.detach()), (value.detach().T, stored.detach().T)):
            rows, columns = matrix.shape
            if columns != width_in or rows % width_out:
                continue
            packed = rows // width_out
            for k in range(packed):
                at = slice(k * width_out, (k + 1) * width_out)
                yield matrix[at], own[at]
            if packed > 1:  # interleaved
                for k in range(packed):
                    yield matrix[k::packed], own[k::packed]
