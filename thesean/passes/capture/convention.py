"""From torch.export's calling convention to the guide's own: inputs by name, outputs nested as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from thesean.errors import CaptureError
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.give_back import give_back
from thesean.passes.graph.opaque_memories import MEMORIES, in_another_order

logger = logging.getLogger(__name__)

_PIECE = 2**20  # numbers

# (relative, absolute): sums in another order. Of half precision absolute ones are of the largest value, which may have
# been rounded on its way to a small one.
_CLOSE = {torch.float16: (5e-3, 5e-3), torch.bfloat16: (4e-2, 4e-2)}


def plain_calling_convention(graph_module: fx.GraphModule, names: list[str], eager: Any) -> fx.GraphModule:
    """Replace export's pytree calling convention by placeholders in order and a nested output node."""
    graph = graph_module.graph
    written = {name.lower(): name for name in names}  # torch.export writes its inputs small
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target) not in names and str(node.target) in written:
            node.target = written[str(node.target)]
            node._rename(node.target)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in names and str(node.target) not in names:
            if node.users:
                raise CaptureError(f"input {node.name!r} of the graph is not one of the example inputs {names}.")
            graph.erase_node(node)
    output = graph.output_node()
    leaves = list(pytree.tree_leaves(output.args[0]))
    structure = _nest(eager, leaves)
    if leaves:
        raise CaptureError(f"the guide's output of type {type(eager).__name__} has a structure that can't be kept.")
    output.args = (structure,)
    graph.set_codegen(fx.graph.CodeGen())
    placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    first = next(iter(graph.nodes))
    for name in names:  # forward()'s order
        node = placeholders[name]
        if node is not first:
            first.prepend(node)
    # a new module: the exported one carries hooks that check the old convention
    return fx.GraphModule(graph_module, graph)


def _nest(value: Any, leaves: list[Any]) -> Any:
    """The nesting of `value` with the graph's output nodes as leaves, consumed in order."""
    if isinstance(value, torch.Tensor):
        return leaves.pop(0)
    if value is None:
        # export keeps None among the leaves of tuples and dicts
        if leaves and leaves[0] is None:
            leaves.pop(0)
        return None
    if isinstance(value, (bool, int, float, str)) and leaves and not isinstance(leaves[0], fx.Node):
        return leaves.pop(0)  # whatever the inputs: export has it as it is
    if isinstance(value, Mapping):
        return {k: _nest(v, leaves) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return (
            type(value)(_nest(v, leaves) for v in value)
            if type(value) in (tuple, list)
            else tuple(_nest(v, leaves) for v in value)
        )
    if is_dataclass(value):
        return {f.name: _nest(getattr(value, f.name), leaves) for f in fields(value)}
    counted = isinstance(value, (bool, int, float))
    kind = "number that comes of its inputs" if counted else type(value).__name__
    raise CaptureError(
        f"the guide returns a {kind}; expected tensors in tuples, lists, dicts or dataclasses. "
        "Leave it out there, or wrap the guide in a module that returns the tensors alone."
    )


_FEW = 2**18  # of an output that is in hand while the guide is traced

Thinned = list[tuple[torch.Size, torch.Tensor]]


def first_shown(captured: Captured, eager: Any) -> Thinned | None:
    """Of the guide's outputs on the example, what `check_same` looks at; None where an output hasn't a row for each of
    the batch.
    """
    rows, values = captured.signature.check(captured.example).get("batch"), tensors(eager)
    if rows is not None and not all(v.ndim and len(v) == rows for v in values):
        return None
    return [_shown(v if rows is None else v[:_ROWS], _FEW) for v in values]


@torch.no_grad()
def check_same(
    captured: Captured, guide: Callable[[dict[str, torch.Tensor]], Any], shown: Thinned | None = None
) -> None:
    """The graph must compute what the guide computes: anything else is a capture that went wrong silently.

    On a few rows of the example's batch, and a million numbers from all over their outputs: with a large vocabulary the
    whole of them is as large as the guide. What was `shown` of them is taken for the guide's own, which is run again
    only where the graph disagrees with that.
    """
    few = captured.signature.first_rows(captured.example, _ROWS)
    try:
        if shown is not None and not _told_apart(captured, few, shown, _FEW):
            # it was run on more: whoever looks at some rows needn't run it on them alone
            rows = captured.signature.check(captured.example).get("batch", 0)
            captured.graph_module.meta["rows_apart"] = rows > _ROWS
            return
        if not _disagreement(captured, guide, few):
            return
    except Exception as error:  # of the guide's: another input may count what is in the rows that were left out
        logger.debug("the guide does not run on a few rows of its example: %s", error)
    told = _disagreement(captured, guide, captured.example)
    if told:
        raise CaptureError(f"{told}; is the guide random in eval mode?")


_ROWS = 2


def _disagreement(
    captured: Captured, guide: Callable[[dict[str, torch.Tensor]], Any], inputs: dict[str, torch.Tensor]
) -> str:
    """By how much the two differ on these inputs, in the first output that does; "" where none does."""
    wanted = [_shown(v, _PIECE) for v in tensors(guide(inputs))]
    give_back()
    return _told_apart(captured, inputs, wanted, _PIECE)


def _told_apart(captured: Captured, inputs: dict[str, torch.Tensor], wanted: Thinned, most: int) -> str:
    got = _outputs(captured, inputs)
    for index, (a, (shape, b)) in enumerate(zip(got, wanted, strict=True)):
        if a.shape != shape:
            return f"the captured graph gives {tuple(a.shape)} where the guide gives {tuple(shape)} in output {index}"
        a = thinned(a, most)
        if not _close(a, b) and not _close(a, b, _rounding(captured, inputs, index, a, most)):
            error = (_numbers(a) - _numbers(b)).abs().max().item()
            return f"the captured graph disagrees with the guide by {error:.1e} in output {index}"
    return ""


def _outputs(captured: Captured, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(captured.graph_module(**inputs)) if isinstance(v, torch.Tensor)]


# Of what another order of sums changes, how much the guide's own may be away, and of an output's largest value.
_ORDERS, _AT_MOST = 10, 1e-3


def _rounding(
    captured: Captured, inputs: dict[str, torch.Tensor], index: int, value: torch.Tensor, shown: int
) -> float:
    """How far an output may be from the guide's, whose recurrences are summed up in an order of its own: seen by what
    a third order makes of it. A trained delta rule's is two or three times as far (3e-5 of 20, in float32).
    """
    remembers = any(node.target in MEMORIES for node in captured.graph_module.graph.nodes)
    if not remembers or not value.is_floating_point():
        return 0.0
    with in_another_order():
        other = thinned(_outputs(captured, inputs)[index], shown)
    moved, most = (other - value).abs().max(), value.abs().max()
    return float(torch.minimum(_ORDERS * moved, _AT_MOST * most).nan_to_num())


def _numbers(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.dtype == torch.bool else value  # which torch doesn't subtract


def _shown(value: torch.Tensor, most: int) -> tuple[torch.Size, torch.Tensor]:
    return value.shape, thinned(value, most)


def thinned(value: torch.Tensor, most: int) -> torch.Tensor:
    """About that many of its numbers, by a step that is odd: an even one may see the same columns of each row alone."""
    return value.reshape(-1)[:: max(1, value.numel() // most) | 1].clone()


def same_outputs(first: Any, second: Any) -> bool:
    """Whether two runs of one guide agree, as far as rounding lets them."""
    found, wanted = tensors(first), tensors(second)
    pairs = list(zip(found, wanted, strict=False))
    return len(found) == len(wanted) and all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(a: torch.Tensor, b: torch.Tensor, more: float = 0.0) -> bool:
    """`more`: what else they may differ by."""
    if b.dtype == torch.bool:
        return torch.equal(a, b)
    relative, absolute = _CLOSE.get(b.dtype, (1e-4, 1e-5))
    if b.dtype in _CLOSE and b.numel():
        absolute *= float(b.abs().nan_to_num(posinf=0.0).max())
    absolute += more
    pieces = zip(_pieces(a), _pieces(b), strict=True)
    return all(torch.allclose(x, y, rtol=relative, atol=absolute, equal_nan=True) for x, y in pieces)


def _pieces(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is made on the way of `allclose` or `isfinite` is several times as large as what it looks at."""
    return value.reshape(-1).split(_PIECE)


def void(eager: Any) -> bool:
    """Whether no output holds a finite number, though there are outputs."""
    floats = [v for v in tensors(eager) if v.is_floating_point() and v.numel()]
    return bool(floats) and not any(bool(piece.isfinite().any()) for v in floats for piece in _pieces(v))


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a guide's output, nested as it may be, in order."""
    leaves: list[torch.Tensor] = []
    _collect(value, leaves)
    return leaves


def _collect(value: Any, leaves: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
    elif isinstance(value, Mapping):
        for v in value.values():
            _collect(v, leaves)
    elif isinstance(value, (tuple, list)):
        for v in value:
            _collect(v, leaves)
    elif is_dataclass(value):
        for f in fields(value):
            _collect(getattr(value, f.name), leaves)
