"""What a conversion is made of, seen as a checkpoint: weights that kept their names, and modules in place of others.

O outputs, I inputs of a linear map
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from thesean.errors import NativeError
from thesean.passes.plan.plan import Plan
from thesean.targets.gqa import GroupedQueries
from thesean.targets.narrow import NarrowMLP
from thesean.targets.narrow_heads import NarrowAttention

_NUMBERED = re.compile(r".*_(\d+)(?:_(\d+))?")


@dataclass(frozen=True)
class Smaller:
    """A module that stands where the guide had a larger one, at `path`. Its linear maps in order, and the number that
    became smaller.
    """

    path: str
    kind: str
    number: int
    maps: tuple[nn.Linear, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How names of weights may begin that stood there; of "a.b.first..c.last" those of either end."""
        first, _, last = self.path.partition("..")
        steps = first.split(".")
        ends = [".".join([*steps[:k], last]) for k in range(len(steps))] if last else []
        return tuple(f"{end}." for end in (first, *ends))


@dataclass(frozen=True)
class Pieces:
    """`weights`: the guide's own, by their names."""

    weights: Mapping[str, torch.Tensor]
    smaller: tuple[Smaller, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self.weights, *(prefix for module in self.smaller for prefix in module.prefixes))


def pieces_of(module: fx.GraphModule, plan: Plan) -> Pieces:
    """Raises NativeError for a part that became something else than fewer of the same."""
    smaller: list[Smaller] = []
    names: list[str] = []
    for node in module.graph.find_nodes(op="call_module"):
        name = str(node.target)
        found = module.get_submodule(name)
        if name in names or not any(True for _ in found.parameters()):
            continue
        names.append(name)
        numbered = _NUMBERED.fullmatch(name)
        row = plan.replaced[int(numbered[1])] if numbered and int(numbered[1]) < len(plan.replaced) else None
        path = name if row is None else (row.replaces or (row.path,))[int((numbered and numbered[2]) or 0)]
        smaller.append(_smaller(path, row.target if row else type(found).__name__, found))
    own = dict(module.named_parameters(remove_duplicate=False))
    inside = tuple(f"{name}." for name in names)
    return Pieces({k: v for k, v in own.items() if not k.startswith(inside)}, tuple(smaller))


def _smaller(path: str, target: str, module: nn.Module) -> Smaller:
    if isinstance(module, NarrowMLP):
        maps = (module.up, *((module.gate,) if module.gate is not None else ()), module.last)
        return Smaller(path, "mlp", module.width, maps)
    if isinstance(module, (NarrowAttention, GroupedQueries)) and not len(module.norms):
        number = module.kv_heads if isinstance(module, GroupedQueries) else module.heads
        return Smaller(path, "attention", number, (module.query, module.key, module.value, module.last))
    raise NativeError(
        f"{path}: {target} fits no network of the guide's class: expected the same with fewer neurons or heads "
        "(narrow, narrow-heads, gqa), or fewer layers (copy). Use thesean.hf.save_pretrained."
    )
