"""What types meet in an operator, read off the values that the trace left at each node.

`torch.onnx.export` runs a program once more to write casts where operands differ, though it knows every node's value by
then: an eighth of what an export takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import fx

_RUN = "run_node"


@contextmanager
def promoted_by_value() -> Iterator[None]:
    """Exports inside write the same casts, and compute a node's value only where it has none or is a new one."""
    promotion, original = _exporter()
    if promotion is None:
        yield
        return

    def run_node(interpreter: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return original(interpreter, node)
        rule = promotion.get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            with interpreter._set_current_node(node):
                interpreter._maybe_promote_node(node, rule)
        return node.meta["val"]

    setattr(promotion._TypePromotionInterpreter, _RUN, run_node)
    try:
        yield
    finally:
        setattr(promotion._TypePromotionInterpreter, _RUN, original)


@cache
def _exporter() -> tuple[Any, Any]:
    """torch's module and its method as it was; None where a torch has them elsewhere: exports take longer there.

    Until torch reads the values itself: 2.13 runs the program always, and no public argument prevents it.
    """
    try:
        from torch.onnx._internal.fx.passes import type_promotion
    except ImportError:
        return None, None
    interpreter = getattr(type_promotion, "_TypePromotionInterpreter", None)
    needed = (_RUN, "_set_current_node", "_maybe_promote_node")
    known = hasattr(type_promotion, "get_type_promotion_rule") and all(hasattr(interpreter, n) for n in needed)
    return (type_promotion, vars(interpreter).get(_RUN)) if known else (None, None)
