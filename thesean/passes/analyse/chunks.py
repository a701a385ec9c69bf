"""Does a threaded graph give in chunks what it gives at once? And if not, where does it first differ?

B batch, T time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thesean.passes.graph.nodes import LookingInterpreter
from thesean.passes.graph.signature import Signature

# Of a node's own largest value. Rounding moves a node by 1e-5 at most, mixing by its whole scale; the first node that
# mixes is looked for, so nothing has been attenuated yet.
_MOVED = 1e-2
_NOISE = 1e-6

# A mark in a node's meta: it holds a mask between steps, or a count that the next node completes. No chunk's is the
# whole's; what is made of it is compared.
RELATES = "relates_steps"

# And another: it makes a sequence of the caller's length of one with earlier steps in front, which a state holds. No
# rule of operators tells that it looks at no later step; its chunks are the whole's, and are compared.
LOOKS_BACK = "looks_back"

# Of an output's scale, where rounding is coarser than float32's
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}

aten = torch.ops.aten
_SORTS = {aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable}

_OTHERS = "it needs other steps than its chunk's"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first node whose values in chunks are not those of the whole sequence."""

    node: str
    what: str


def cut(length: int, first: Sequence[int]) -> tuple[int, ...]:
    """Chunks of these sizes and one of the rest, as far as the length goes."""
    chunks: list[int] = []
    for size in (*first, length):
        if sum(chunks) < length:
            chunks.append(min(size, length - sum(chunks)))
    return tuple(chunks)


def split_inputs(
    signature: Signature, inputs: dict[str, torch.Tensor], chunks: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """The inputs of each chunk, cut along their time dimension; one without, and what is held, is whole in each."""
    pieces: list[dict[str, torch.Tensor]] = [{} for _ in chunks]
    for spec in signature.inputs:
        free = [i for i, d in enumerate(spec.shape) if isinstance(d, str) and not d.startswith("batch")]
        dims = [] if spec.held else free
        whole = inputs[spec.name]
        parts = whole.split(list(chunks), dims[0]) if dims else [whole] * len(chunks)
        for piece, part in zip(pieces, parts, strict=True):
            piece[spec.name] = part
    return pieces


@torch.no_grad()
def run_in_chunks(
    threaded: fx.GraphModule,
    signature: Signature,
    inputs: dict[str, torch.Tensor],
    states: dict[str, torch.Tensor],
    chunks: Sequence[int],
) -> tuple[list[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]:
    """The outputs of each chunk, and the states after the last one by the names of the inputs that take them."""
    outputs = []
    for piece in split_inputs(signature, inputs, chunks):
        result = threaded(**piece, **states)
        count = len(result) - len(states)
        outputs.append(result[:count])
        states = dict(zip(states, result[count:], strict=True))
    return outputs, states


def join(parts: Sequence[torch.Tensor], shape: torch.Size, delay: int = 0) -> torch.Tensor | str:
    """The parts in a row along the one dimension in which they differ from `shape`; the last part where none does.

    What grows with the sequence, such as keys that are kept, is there after the last part. A text says why they can't
    be the parts of such a whole, or of one that is `delay` steps longer there.
    """
    if parts[-1].shape == shape:
        return parts[-1]
    if any(p.ndim != len(shape) for p in parts):
        return "its rank depends on the length"
    dims = [d for d, size in enumerate(shape) if any(p.shape[d] != size for p in parts)]
    if not dims:
        return parts[-1]
    if len(dims) > 1:
        return f"shape {tuple(shape)} relates steps with each other"
    if sum(p.shape[dims[0]] for p in parts) != shape[dims[0]] + delay:
        return f"shape {tuple(shape)} is not the chunks' in a row"
    return torch.cat(list(parts), dims[0])


@torch.no_grad()
def same_in_chunks(
    threaded: fx.GraphModule,
    signature: Signature,
    inputs: dict[str, torch.Tensor],
    states: dict[str, torch.Tensor],
    chunks: Sequence[int],
) -> Difference | None:
    """Compares every node that inputs' values enter. Batches of one only: joined rows would interleave otherwise.

    What is made of sorted rows, such as tokens by the expert that they go to, may be in another order, as long as what
    is made of that is in order again; both get their marks.
    """
    whole, stuck = _record(threaded, {**inputs, **states})
    if stuck is not None:
        return Difference(node=stuck.name, what="one row alone does not run")
    runs: list[dict[fx.Node, Any]] = []
    broken: fx.Node | None = None
    for piece in split_inputs(signature, inputs, chunks):
        values, broken = _record(threaded, {**piece, **states})
        runs.append(values)
        if broken is not None:
            break
        states = dict(zip(states, values[threaded.graph.output_node()][-len(states) :], strict=True))
    ordered, out_of_order = after_sorting(threaded.graph), dict[fx.Node, str]()
    entered = set(threaded.graph.find_nodes(op="placeholder"))
    after_broken: set[fx.Node] = {broken} if broken is not None else set()
    for node in threaded.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if not after_broken.isdisjoint(node.all_input_nodes):
            after_broken.add(node)
        value = whole[node]
        if entered.isdisjoint(node.all_input_nodes) or not isinstance(value, (torch.Tensor, tuple, list)):
            continue  # sizes carry no values
        entered.add(node)
        if not isinstance(value, torch.Tensor) or RELATES in node.meta:
            continue
        # what breaks is the making of a mask or an index; what it is for is where a hidden state meets it
        if node in after_broken and any(
            i in entered and i not in after_broken and _is_float(whole[i]) for i in node.all_input_nodes
        ):
            return Difference(node=node.name, what=_OTHERS)
        parts = [run[node] for run in runs if node in run]
        what = _difference(value, parts) if broken is None and parts else ""
        if what and node in ordered:
            out_of_order.setdefault(node, what)
        elif what:
            return Difference(node=node.name, what=what)
        elif not out_of_order.keys().isdisjoint(node.all_input_nodes):
            node.meta[LOOKS_BACK] = True  # in order again
    if broken is not None:
        return Difference(node=broken.name, what=_OTHERS)
    if not out_of_order.keys().isdisjoint(threaded.graph.output_node().all_input_nodes):
        sort = next(n for n in threaded.graph.nodes if n in ordered)
        return Difference(node=sort.name, what=next(iter(out_of_order.values())))
    for node in reversed(threaded.graph.nodes):  # what they are made of may look the same in one sequence
        if node in out_of_order or (node in ordered and any(RELATES in u.meta for u in node.users if u in ordered)):
            node.meta[RELATES] = True
    return None


def after_sorting(graph: fx.Graph) -> set[fx.Node]:
    """All that is made of rows in another order."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _SORTS or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _record(graph_module: fx.GraphModule, inputs: dict[str, torch.Tensor]) -> tuple[dict[fx.Node, Any], fx.Node | None]:
    """Every node's value, up to the first node that can't be computed, and that node."""
    values: dict[fx.Node, Any] = {}
    failed: list[fx.Node] = []

    class Recorder(LookingInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            try:
                values[n] = super().run_node(n)
            except (RuntimeError, IndexError):
                failed.append(n)
                raise
            return values[n]

    recorder = Recorder(graph_module, garbage_collect_values=False)
    recorder.extra_traceback = False  # the failure is a finding, not an error to report
    try:
        recorder.run(*inputs.values())
    except (RuntimeError, IndexError):
        return values, failed[0]
    return values, None


def _difference(whole: torch.Tensor, parts: list[torch.Tensor]) -> str:
    """What is wrong with the parts, "" when they make up the whole."""
    joined = join(parts, whole.shape)
    if isinstance(joined, str) or whole.numel() == 0:
        return joined if isinstance(joined, str) else ""
    wide = torch.complex128 if whole.is_complex() else torch.float64
    error = (joined.to(wide) - whole.to(wide)).abs().max().item()
    scale = whole.to(wide).abs().max().item()
    return f"step by step it differs by {error:.1e} of {scale:.1e}" if error > _MOVED * scale + _NOISE else ""


def is_close(got: torch.Tensor | str, want: torch.Tensor) -> bool:
    """The same but for rounding; a text says what else it is."""
    bound = _CLOSE.get(want.dtype, 1e-4) * max(1.0, want.abs().max().item())
    return not isinstance(got, str) and got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=bound)
