"""What a node costs: parameters it reads and FLOPs at given sizes, on fake tensors, so nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from thesean.passes.graph import attribute
from thesean.passes.signature import Signature
from thesean.targets.base import PartFacts, TargetModule

aten = torch.ops.aten


def count_params(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> int:
    """Parameters that these nodes read, each once."""
    paths = {str(i.target) for n in nodes for i in n.all_input_nodes if i.op == "get_attr"}
    tensors = {id(t): t for t in (attribute(graph_module, p) for p in paths) if isinstance(t, torch.nn.Parameter)}
    return sum(t.numel() for t in tensors.values())


class _FlopInterpreter(fx.Interpreter):
    """FLOPs (two per multiply-add) a node; a target module says its own, since recurrences hide theirs."""

    def __init__(self, graph_module: fx.GraphModule, sizes: dict[str, int], facts: dict[str, PartFacts]) -> None:
        super().__init__(graph_module, garbage_collect_values=True)
        self.sizes, self.facts = sizes, facts
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        counter = FlopCounterMode(display=False)
        with counter:
            value = super().run_node(n)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, TargetModule) and str(n.target) in self.facts:
            self.flops[n] = module.flops(self.facts[str(n.target)], self.sizes)
        elif n.target is aten.scaled_dot_product_attention.default:
            # the fused CPU kernel is not in torch's registry: q k' and w v
            q, k, v = (self.env_value(a) for a in n.args[:3])
            scores = math.prod(q.shape[:-1]) * k.shape[-2]
            self.flops[n] = 2 * scores * (q.shape[-1] + v.shape[-1])
        else:
            self.flops[n] = counter.get_total_flops()
        return value

    def env_value(self, node: Any) -> Any:
        return self.env[node]


def flops_by_node(
    graph_module: fx.GraphModule,
    signature: Signature,
    sizes: dict[str, int],
    facts: dict[str, PartFacts] | None = None,
) -> dict[fx.Node, int]:
    """FLOPs of every node in one forward at `sizes` of the dynamic dimensions; `facts` by module name."""
    inputs = signature.random_inputs(sizes)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(v) for v in inputs.values()]
        interpreter = _FlopInterpreter(graph_module, sizes, facts or {})
        interpreter.run(*fake)
    return interpreter.flops
