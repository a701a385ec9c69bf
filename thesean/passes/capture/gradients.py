"""Training the graph is training the guide: one backward pass of each, compared parameter by parameter."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from thesean.kernels.shared.precision import HALF
from thesean.passes.capture.captured import Captured
from thesean.passes.capture.convention import tensors, thinned
from thesean.passes.capture.explain import short
from thesean.passes.capture.guide import Guide
from thesean.passes.capture.probe import probe_sizes
from thesean.passes.graph.nodes import attribute, owner

logger = logging.getLogger(__name__)

aten = torch.ops.aten

# Of a parameter's largest gradient: sums in another order differ by 1e-5, a path that is lost by all of it.
_EXACT = 1e-2
# In half precision the same sums are off by as much as this.
_EXACT_IN_HALF = 0.1
# Of the largest gradient of all: what is less has no digits left to compare.
_FAINT = 1e-5

# Of the numbers in all gradients what is held at once, and what is always held.
_SHARE = 1 / 16
_ALWAYS = 1_000_000
# Of one gradient what is compared: a path that is lost shows in all of it.
_COMPARED = 2**14

# derivative zero almost everywhere
_FLAT = {"round", "sign", "sgn", "floor", "ceil", "trunc", "heaviside", "argmax", "one_hot", "_to_copy", "to"}


def keep_training(captured: Captured, guide: Guide) -> Captured:
    """The captured graph with all parameters that the guide's output hangs on as its own: those that forward reads
    from a plain list, a closure or a global were constants. `untrainable` says what its gradients are not.
    """
    graph_module = captured.graph_module
    device = str(next(iter(captured.example.values())).device)
    inputs = captured.signature.random_inputs(probe_sizes(captured), device=device)
    with torch.enable_grad():
        try:
            output = guide(inputs)
        except Exception as error:
            logger.debug("gradients are not compared: the guide does not run on small inputs: %s", short(error))
            return captured
        leaves = _leaves(output)
        if not leaves:  # frozen, or forward is under no_grad from end to end: it says nothing of what should train
            _undo_detached(graph_module)
            return captured
        adopted = _adopt(graph_module, leaves)
        names = {id(p): name for name, p in graph_module.named_parameters()}
        made = {id(p) for p in adopted.values()}
        everything = {id(p): p for p in (*leaves, *graph_module.parameters()) if p.requires_grad and id(p) not in made}
        parameters = _affordable(everything.values())
        try:
            wanted = _backward(output, parameters)
            del output
            guide.buffers.restore()  # one that the guide wrote holds on to what it was made of
            own = [adopted.get(id(p), p) for p in parameters]
            found = _backward(graph_module(**inputs), own)
        except RuntimeError as error:  # an operator of the caller's without one
            told = f"the guide has no backward pass ({short(error)}). Solve parts without gradients: recipe='fast'."
            return replace(captured, untrainable=told)
    scale = max((float(g.abs().max()) for g in wanted if g is not None and g.numel()), default=0.0)
    lost = [
        (names.get(id(p), "a tensor outside of the guide"), found_one is None or not bool(found_one.any()))
        for p, want, found_one in zip(parameters, wanted, found, strict=True)
        if not _same(want, found_one, scale)
    ]
    return replace(captured, untrainable=_told(graph_module, lost)) if lost else captured


def _leaves(output: Any) -> list[torch.Tensor]:
    """The tensors that a backward pass from here would give a gradient."""
    front = [v.grad_fn for v in tensors(output) if v.grad_fn is not None]
    seen: set[Any] = set(front)
    found: dict[int, torch.Tensor] = {}
    while front:
        node = front.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and leaf.is_leaf:
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                front.append(following)
    return list(found.values())


def _adopt(graph_module: fx.GraphModule, leaves: Iterable[torch.Tensor]) -> dict[int, nn.Parameter]:
    """Constants of the graph that share a leaf's memory become that parameter; those that stand for a plain tensor, by
    its id.
    """
    own = {id(p) for p in graph_module.parameters()}
    strangers = [p for p in leaves if id(p) not in own and p.is_floating_point()]
    if not strangers:
        return {}
    known: dict[int, nn.Parameter] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = attribute(graph_module, str(node.target))
        leaf = next((p for p in strangers if _same_memory(p, value)), None)
        if leaf is None or isinstance(value, nn.Parameter):
            continue
        parameter = leaf if isinstance(leaf, nn.Parameter) else known.setdefault(id(leaf), nn.Parameter(leaf.detach()))
        path, _, name = str(node.target).rpartition(".")
        holder = graph_module.get_submodule(path)
        delattr(holder, name)
        holder.register_parameter(name, parameter)
        node.meta["val"] = parameter
    return known


def _same_memory(a: torch.Tensor, b: Any) -> bool:
    return isinstance(b, torch.Tensor) and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _undo_detached(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def _affordable(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Small ones first, one of each shape before another of any: what reads weights its own way does so by kind."""
    smallest_first = sorted(parameters, key=torch.Tensor.numel)
    most = max(_ALWAYS, int(_SHARE * sum(p.numel() for p in smallest_first)))
    kinds = {p.shape: p for p in reversed(smallest_first)}
    in_turn = [
        *(p for p in smallest_first if kinds[p.shape] is p),
        *(p for p in smallest_first if kinds[p.shape] is not p),
    ]
    chosen: list[torch.Tensor] = []
    total = 0
    for parameter in in_turn:
        if not chosen or total + parameter.numel() <= most:
            chosen.append(parameter)
            total += parameter.numel()
    return chosen


def _backward(output: Any, parameters: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Some numbers of the gradients of a random weighting of all outputs: one number would hide signs that cancel."""
    generator = torch.Generator().manual_seed(0)
    terms = []
    for value in tensors(output):
        if value.is_floating_point() and value.numel():
            weights = torch.randn(value.shape, generator=generator).to(value)
            if value.requires_grad:
                terms.append((value.masked_fill(~value.isfinite(), 0) * weights).sum())
    if not terms:
        return [None] * len(parameters)
    gradients = torch.autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)
    return [None if g is None else thinned(g, _COMPARED) for g in gradients]


def _same(want: torch.Tensor | None, found: torch.Tensor | None, scale: float) -> bool:
    if want is None and found is None:
        return True
    want, found = (torch.zeros(()) if g is None else g.nan_to_num() for g in (want, found))
    most = max(float(want.abs().max()), float(found.abs().max()))
    exact = _EXACT_IN_HALF if want.dtype in HALF or found.dtype in HALF else _EXACT
    return most <= _FAINT * scale or float((want.to(found.device) - found).abs().max()) <= exact * most


def _told(graph_module: fx.GraphModule, lost: list[tuple[str, bool]]) -> str:
    flat = next((n for n in graph_module.graph.nodes if _is_flat(n)), None)
    place = f", past {owner(flat) or flat.name} ({flat.target})" if flat is not None else ""
    names = ", ".join(name for name, _ in lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    which = "no gradient" if all(none for _, none in lost) else "another gradient"
    return (
        f"training the guide's graph is not training the guide: {names} would get {which}{place}. The backward of a "
        "torch.autograd.Function or of a hook is not kept. Write a straight-through estimator as "
        "x + (f(x) - x).detach(), which is kept, or solve parts without gradients: recipe='fast'."
    )


def _is_flat(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._opname not in _FLAT:
        return False
    source = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    value = node.meta.get("val")
    floating = isinstance(source, torch.Tensor) and source.is_floating_point()
    casts = node.target._opname in ("_to_copy", "to")
    return floating and not (casts and isinstance(value, torch.Tensor) and value.is_floating_point())
