"""Read a bias of distance off a graph: with a query of zero, all that is left of the scores is what was added to them.

It is read at a longer length than was recorded, where a table ends, a line is straight and a sliding window shows: the
scores of zeros are a matter of sizes, of masks that hide nothing, and of the guide's own constants.

T time, H heads, D distances
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import above, compute
from thesean.passes.graph.record import Recorded
from thesean.passes.graph.widen import compute_wide
from thesean.targets.shared.distance_bias import HIDDEN, DistanceBias, Reach

# Masks lower scores by 1e4 at least; no bias that is learnt comes near.
LOW = -1e3

# The longest length is taken that a guide can do, and a longer one while the end of a table does not show; each only
# with so many scores, of heads that differ.
_LENGTHS = (512, 256, 128, 64, 32)
_LONGEST = 2048
_ELEMENTS, _MOST = 2**22, 2**26

# Of the largest entry: positions times slopes in float32 differ by 1e-7, two buckets of a table by more.
_EXACT = 1e-5


def find_distance_bias(
    recorded_HTT: torch.Tensor, at_length: Callable[[int], torch.Tensor | None] | None
) -> DistanceBias | None:
    """The bias that the scores of zero queries show, with hidden keys far down, as recorded and at other lengths; None
    where more than the distance tells it. `at_length` is None where the guide has one length only.
    """
    found = _read(recorded_HTT)
    if found is None or at_length is None:
        return found and found[0]
    heads = 1 if _are_alike(recorded_HTT) else len(recorded_HTT)
    fitting = [n for n in _LENGTHS if n > recorded_HTT.shape[1] and (heads * n**2 <= _ELEMENTS or n == _LENGTHS[-1])]
    longer = ((n, at_length(n)) for n in fitting)
    length, scores_HTT = next(((n, s) for n, s in longer if s is not None), (0, None))
    if scores_HTT is None and not found[1]:
        return None  # a table whose end is not known
    while scores_HTT is not None:
        found = _read(scores_HTT)
        if found is None:
            return None
        length *= 2
        if found[1] or length > _LONGEST or heads * length**2 > _MOST:
            break
        scores_HTT = at_length(length)
    return found[0]


def _read(scores_HTT: torch.Tensor) -> tuple[DistanceBias, bool] | None:
    """(bias, whether its tables end within half of the distances); None where it is no matter of distance alone."""
    heads = len(scores_HTT)
    scores_HTT = scores_HTT[:1] if _are_alike(scores_HTT) else scores_HTT
    if _is_nothing(scores_HTT):  # most guides', and what follows takes some hundred bytes a score
        zero_H1 = torch.zeros(heads, 1, device=scores_HTT.device)
        return DistanceBias(*(Reach(zero_H1.clone(), zero_H1[:, 0].clone()) for _ in range(2))), True
    own_HT1 = scores_HTT.diagonal(dim1=1, dim2=2).unsqueeze(2).double()
    bias_HTT = torch.where(scores_HTT < LOW, HIDDEN, scores_HTT.double() - own_HT1)  # constants of a row cancel
    step_T = torch.arange(scores_HTT.shape[1], device=scores_HTT.device)
    later_TT = step_T > step_T.unsqueeze(1)
    causal = bool((bias_HTT[:, later_TT] == HIDDEN).all())
    behind, ends = _reach(bias_HTT[:, -1].flip(1))
    # what a causal attention would add to later keys is not known, and nobody asks
    ahead, ends_too = _reach(torch.zeros_like(bias_HTT[:, 0]) if causal else bias_HTT[:, 0])
    found = DistanceBias(behind, ahead)
    largest = bias_HTT[bias_HTT > HIDDEN].abs().max().clamp_min(1.0)
    off_HTT = (found.matrix(len(step_T), bias_HTT) - bias_HTT).abs()
    if bool((own_HT1 < LOW).any()) or bool((off_HTT[:, ~(later_TT & causal)] > _EXACT * largest).any()):
        return None
    narrow = [Reach(*(t.float().expand(heads, *t.shape[1:]).contiguous() for t in reach)) for reach in found]
    return DistanceBias(*narrow), ends and ends_too


def _is_nothing(scores_HTT: torch.Tensor) -> bool:
    """Whether each query scores all keys alike that it sees, which are all, or all but the later ones."""
    if len(scores_HTT) > 1:
        return False
    hidden_TT = scores_HTT[0] < LOW
    own_T1 = scores_HTT[0].diagonal().unsqueeze(1)
    differs = bool(((scores_HTT[0] != own_T1) & ~hidden_TT).any())
    return not differs and (not bool(hidden_TT.any()) or torch.equal(hidden_TT, torch.ones_like(hidden_TT).triu(1)))


def _are_alike(scores_HTT: torch.Tensor) -> bool:
    return scores_HTT.stride(0) == 0 or bool((scores_HTT == scores_HTT[:1]).all())


def _reach(bias_HD: torch.Tensor) -> tuple[Reach, bool]:
    """As short a table as says the same, and whether it ends within the first half."""
    step_HD = bias_HD.diff(dim=1)
    bound_H1 = _EXACT * bias_HD.where(bias_HD > HIDDEN, 0.0).abs().amax(1, keepdim=True).clamp_min(1.0)
    odd_D = ((step_HD - step_HD[:, -1:]).abs() > bound_H1).any(0).nonzero()
    size = int(odd_D.max()) + 2 if len(odd_D) else 1
    while True:  # a line is known by its ends better than by one of its steps, and a curve is none
        rest = bias_HD.shape[1] - size
        slope_H = (bias_HD[:, -1] - bias_HD[:, size - 1]) / max(rest, 1)
        line_HD = bias_HD[:, size - 1 : size] + slope_H.unsqueeze(1) * torch.arange(rest + 1, device=bias_HD.device)
        if bool(((line_HD - bias_HD[:, size - 1 :]).abs() <= bound_H1).all()):
            break
        size += (rest + 1) // 2
    table_HD, slope_H = (t.where(t.abs() > _EXACT, 0.0) for t in (bias_HD[:, :size], slope_H))
    return Reach(table_HD, slope_H), size <= bias_HD.shape[1] // 2


@torch.no_grad()
def at_length(
    scores: fx.Node, zeroed: tuple[fx.Node, ...], values: Mapping[fx.Node, Any], length: int
) -> torch.Tensor | None:
    """`scores` for one example of this length where the `zeroed` nodes hold zeros; None where an input's values enter,
    or where the guide is made for less. A mask that shows everything is taken to show everything there too.
    """
    sizes = {symbol: 1 if name.startswith("batch") else length for symbol, name in _symbols(scores).items()}
    run = compute_wide if isinstance(values, Recorded) and values.wide else compute
    behind = above([scores], zeroed)
    known: dict[fx.Node, Any] = {}
    try:
        for node in (n for n in values if n in behind or n in zeroed):  # in the graph's order
            value = node.meta.get("val")
            if node in zeroed:
                known[node] = values[node].new_zeros(_shape(node.meta["val"], sizes))
            elif node.op == "get_attr":
                known[node] = values[node]
            elif isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
                known[node] = _number(value, sizes)
            elif node.op == "call_function" and all(i in known for i in node.all_input_nodes):
                known[node] = run(node, known.__getitem__)
            elif isinstance(value, torch.Tensor) and _is_one_number(values[node]):
                known[node] = values[node].flatten()[0].expand(_shape(value, sizes)).contiguous()
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    found = known.get(scores)
    return found if isinstance(found, torch.Tensor) else None


def has_lengths(node: fx.Node) -> bool:
    """Whether the guide takes sequences of several lengths."""
    return any(not name.startswith("batch") for name in _symbols(node).values())


def _symbols(node: fx.Node) -> Mapping[str, str]:
    graph_module = node.graph.owning_module
    return graph_module.meta.get("symbols", {}) if graph_module is not None else {}


def _is_one_number(value: torch.Tensor) -> bool:
    return value.numel() > 0 and bool((value == value.flatten()[0]).all())


def _shape(value: torch.Tensor, sizes: Mapping[str, int]) -> list[int]:
    return [int(_number(d, sizes)) for d in value.shape]


def _number(value: Any, sizes: Mapping[str, int]) -> Any:
    """A size, or what is computed of sizes, at these sizes of the symbols."""
    if isinstance(value, (int, float, bool)):
        return value
    expression = value.node.expr.subs({s: sizes[str(s)] for s in value.node.expr.free_symbols})
    return type(value.node.hint)(expression) if value.node.hint is not None else int(expression)
