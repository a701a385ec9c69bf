"""Activation checkpointing: regions of a network, computed anew in the backward (Chen et al. 2016, arXiv 1604.06174).

What a region keeps for its backward is let go after its forward; its inputs are held, and it is run once more when its
backward comes, in the same random state and with buffers as they were: loss, gradients and weights are the same bits.
Where weights lie in slices (sharded.py), a region is also what they are gathered for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from thesean import ranks
from thesean.distill.sharded import hold
from thesean.distill.together import together
from thesean.passes.graph.cuts import Cuts, find_cuts
from thesean.passes.graph.modes import KeptBuffers
from thesean.passes.graph.walk import Inputs
from thesean.recipe import Recipe
from thesean.units import quantity

Run = Callable[..., Any]


class Recomputed(nn.Module):
    """A function of tensors that runs these modules, computed anew in the backward."""

    def __init__(self, function: Run, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        own = list(modules)
        self.function = function
        self._writing = [m for module in own for m in module.modules() if any(True for _ in m.buffers(False))]
        self._weights = [p for module in own for p in module.parameters()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = [(m, {k: b.clone() for k, b in m.named_buffers(recurse=False)}) for m in self._writing]

        def run(*args: Any) -> Any:
            hold([*args, *self._weights])
            return self.function(*args, **kwargs)

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), _once_more(before)

        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def _once_more(before: list[tuple[nn.Module, dict[str, torch.Tensor]]]) -> Iterator[None]:
    """Modules read the buffers that they read the first time, and what they write to them is lost."""
    now = [(m, {k: getattr(m, k) for k in values}) for m, values in before]
    try:
        for module, values in before:
            module._buffers.update(values)
        with together():
            yield
    finally:
        for module, values in now:
            module._buffers.update(values)


class Recomputing:
    """Runs graph modules, with regions of them computed anew if the recipe says so; `told` is what that saves.

    Where weights lie in slices, regions are as the plan has them, from the end of one part to the end of the next.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sharded = recipe.sharded and ranks.count() > 1
        self.wanted = recipe.activation_checkpointing or self.sharded
        self._told: dict[str, str] = {}

    @property
    def told(self) -> str:
        return "; ".join(self._told.values())

    def module(self, module: nn.Module) -> Run:
        """All of one that is run by itself."""
        if not self.wanted:
            return module
        self._told["parts"] = "activations of each part are computed anew in its backward"
        return Recomputed(module, [module])

    def graph(self, graph_module: fx.GraphModule, ends: Sequence[str]) -> Run:
        """As the graph module is called; `ends` are the nodes of its parts' exits, as far as it has them. Where it is
        cut for activations alone is found by the first batch.
        """
        if not self.wanted:
            return graph_module
        if self.sharded:
            return self._part_to_part(graph_module, ends)
        made: list[Run] = []

        def run(**inputs: torch.Tensor) -> Any:
            if not made:
                after = self.cuts(graph_module, inputs).after
                # what comes before the first cut needs no backward, and what comes after the last has it at once
                made.append(_split(graph_module, after, range(1, len(after))))
            return made[0](**inputs)

        return run

    def frozen(self, graph_module: fx.GraphModule, ends: Sequence[str]) -> Run:
        """One that nothing has a gradient of: only weights in slices are a reason to cut it."""
        return self._part_to_part(graph_module, ends) if self.sharded else graph_module

    def _part_to_part(self, graph_module: fx.GraphModule, ends: Sequence[str]) -> Run:
        self._told["weights"] = f"weights lie in slices on {ranks.count()} processes, gathered from part to part"
        return _split(graph_module, ends, range(len(ends) + 1))

    def cuts(self, graph_module: fx.GraphModule, inputs: Inputs) -> Cuts:
        """The same on all ranks, which compute together where a region is run once more."""
        found = ranks.first(lambda: _found(graph_module, inputs))
        told = "activations are computed anew in no region: none would save any"
        if found.after:
            saved = f"a step holds {quantity(found.held, 'B')} of them at once, not {quantity(found.without, 'B')}"
            told = f"activations of {len(found.after) - 1} regions are computed anew in their backward: {saved}"
        self._told["regions"] = told
        return found


def _found(graph_module: fx.GraphModule, inputs: Inputs) -> Cuts:
    buffers = KeptBuffers(graph_module)
    devices = {t.device.index for t in inputs.values() if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        found = find_cuts(graph_module, inputs)
    buffers.restore()
    return found


def _split(graph_module: fx.GraphModule, after: Iterable[str], anew: range) -> Run:
    """Regions that end after the nodes of these names; those of these numbers are computed anew."""
    places = {node.name: at for at, node in enumerate(graph_module.graph.nodes)}
    ends = sorted({places[name] for name in after if name in places})
    if not anew:
        return graph_module
    split = split_module(
        graph_module,
        graph_module,
        lambda node: bisect_left(ends, places[node.name]),
        keep_original_order=True,
        tuple_return=True,
    )
    for number in anew:
        name = f"submod_{number}"
        if hasattr(split, name):  # where there is anything to compute
            setattr(split, name, Recomputed(split.get_submodule(name), [split.get_submodule(name)]))
    return split
