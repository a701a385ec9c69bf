"""Which rules of onnxscript's optimizer are tried at a node: those that begin with its operator.

The optimizer tries some fifty patterns at each node of a file, all of them to the point where the operator differs, and
for one of them it looks through the whole file first: a quarter to a half of what an export takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRY = "try_rewrite"


@contextmanager
def rules_by_operator() -> Iterator[None]:
    """Optimizations inside apply the same rules, in the same order."""
    rule_class, original = _optimizer()
    if rule_class is None:
        yield
        return

    def try_rewrite(rule: Any, model: Any, graph: Any, node: Any, **settings: Any) -> Any:
        begins = _begins(rule)
        if begins is not None and begins != (node.domain, node.op_type) and settings.get("tracer") is None:
            return None
        return original(rule, model, graph, node, **settings)

    setattr(rule_class, _TRY, try_rewrite)
    try:
        yield
    finally:
        setattr(rule_class, _TRY, original)


@cache
def _optimizer() -> tuple[Any, Any]:
    """onnxscript's class and its method as it was; None where a release has them elsewhere: exports take longer there.

    Until onnxscript looks at the operator first: 0.7 keeps its rules in one list.
    """
    try:
        from onnxscript.rewriter import RewriteRule
    except ImportError:
        return None, None
    original = vars(RewriteRule).get(_TRY)
    return (None, None) if original is None else (RewriteRule, original)


@cache  # the rules are made once a process
def _begins(rule: Any) -> tuple[str, str] | None:
    """Domain and name of the operator at which a match begins; None where several can stand there. A pattern of several
    outputs begins with the first one's, and looks through the whole file for the others.
    """
    outputs: Any = getattr(getattr(rule, "_target_pattern", None), "output_nodes", None)
    if not outputs:
        return None
    found = outputs[0].op_identifier()
    return None if found is None else (found[0], found[1])
