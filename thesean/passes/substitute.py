"""Cut a region out of a graph and put a module in its place."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

from torch import fx, nn

from thesean.errors import PassRefused
from thesean.passes.analyse.dataflow import data_flow
from thesean.passes.analyse.regions import Region, is_single_entry_single_exit
from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import clean


@dataclass(frozen=True)
class Substitute(Pass):
    """exit = region(entry)  =>  exit' = module(entry), or module(entry)[0] when the module carries a state.

    Everything outside of the region keeps its nodes and its parameters, bit for bit. The module is called `name`.
    """

    path: str
    region: Region
    name: str
    module: nn.Module

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.region.exit.graph is not graph_module.graph:
            raise PassRefused(f"{self.path}: the region belongs to another graph. Plan again for this one.")
        if hasattr(graph_module, self.name):
            raise PassRefused(f"{self.path}: the graph has an attribute {self.name!r} already.")
        if not is_single_entry_single_exit(data_flow(graph_module.graph), self.region):
            raise PassRefused(f"{self.path}: expected one entry and one exit, found more. Split it with parts=[...].")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.cut(graph_module)
        clean(graph_module)
        return PassResult(graph_module=graph_module, modified=True)

    def cut(self, graph_module: fx.GraphModule) -> fx.Node:
        """Rewire alone, and the node that holds the module's output: for many cuts that are cleaned up after once."""
        graph, region = graph_module.graph, self.region
        graph_module.add_submodule(self.name, self.module)
        with graph.inserting_after(region.exit):
            call = graph.call_module(self.name, (region.entry,))
        out = call
        if getattr(self.module, "stateful", False):
            with graph.inserting_after(call):
                out = graph.call_function(getitem, (call, 0))
        out.meta = {k: v for k, v in region.exit.meta.items() if k in ("val", "nn_module_stack")}
        call.meta["nn_module_stack"] = region.exit.meta.get("nn_module_stack", {})
        region.exit.replace_all_uses_with(out, delete_user_cb=lambda user: user is not call)
        return out

    def ensures(self, graph_module: fx.GraphModule) -> None:
        super().ensures(graph_module)
        called = [n for n in graph_module.graph.nodes if n.op == "call_module" and n.target == self.name]
        assert len(called) == 1, f"{self.path}: {len(called)} calls of {self.name}"


def output_of(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """The node that holds the output of target module `name`: the call, or item 0 of a stateful one."""
    call = next(n for n in graph_module.graph.nodes if n.op == "call_module" and n.target == name)
    if getattr(graph_module.get_submodule(name), "stateful", False):
        return next(u for u in call.users if u.target is getitem and u.args[1] == 0)
    return call


def input_of(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """The node that target module `name` reads."""
    call = next(n for n in graph_module.graph.nodes if n.op == "call_module" and n.target == name)
    entry = call.args[0]
    assert isinstance(entry, fx.Node)
    return entry
