"""What a pass is: a frozen dataclass, graph in, graph out, with a reason when it does not apply."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """`graph_module` is the same object that came in when `modified` is False; `reason` then says why."""

    graph_module: fx.GraphModule
    modified: bool
    reason: str = ""


@dataclass(frozen=True)
class Pass:
    """A rewrite. `requires` raises PassRefused, `ensures` checks what `call` promised; `__call__` runs all three."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raises PassRefused, naming part, found and expected."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise TypeError(f"{type(self).__name__} defines no call()")

    def ensures(self, graph_module: fx.GraphModule) -> None:
        graph_module.graph.lint()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        self.requires(graph_module)
        result = self.call(graph_module)
        if result.modified:
            result.graph_module.recompile()
            self.ensures(result.graph_module)
        return result
