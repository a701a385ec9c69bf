"""Which branches of the loader a run comes by, each with the one before it: what tells a fuzzer that a folder is new.

The code of live functions is replaced by one that tells: a call a branch, where a tracer takes one a line of torch.
"""

from __future__ import annotations

import ast
import gc
from collections import Counter
from collections.abc import Iterable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from benchmarks.suite import ROOT

FILES = (
    "thesean/load_artifact.py", "thesean/artifact.py", "thesean/module_outputs.py", "thesean/replace_folder.py",
    "thesean/plain_yaml.py", "thesean/converted.py", "thesean/passes/graph/*.py", "thesean/passes/plan/plan*.py",
    "thesean/passes/plan/table.py", "thesean/report/*.py", "thesean/targets/*.py", "thesean/targets/shared/*.py",
)  # fmt: skip
_HIT = "__reached__"


class Reached:
    """After `watch`, `pairs` holds what was reached since `clear`: a branch and the one before it, as one number."""

    def __init__(self) -> None:
        self.pairs: set[int] = set()
        self._last = 0

    def watch(self) -> int:
        """Have the functions of FILES tell, as far as they are imported. Returns how many do."""
        count = 0
        # `is`: there are objects that import a module where they are asked for their class
        for function in [f for f in gc.get_objects() if type(f) is FunctionType]:
            own = function.__code__
            code = telling().get((own.co_filename, *_place(own)))
            if code is not None and code.co_freevars == own.co_freevars:
                function.__globals__[_HIT] = self._hit
                function.__code__ = code
                count += 1
        return count

    def clear(self) -> None:
        self.pairs, self._last = set(), 0

    def _hit(self, branch: int) -> None:
        self.pairs.add(self._last << 20 | branch)
        self._last = branch


@cache
def telling() -> dict[tuple[str, str, int], CodeType]:
    """File, name and line of a function -> its code, which tells. Some of one line are not told apart, and stay."""
    found: dict[tuple[str, str, int], CodeType] = {}
    branches = 0
    for path in sorted({p for glob in FILES for p in ROOT.glob(glob)}):
        visitor = _Telling(branches)
        tree = visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        branches = visitor.number
        codes = list(_codes(compile(ast.fix_missing_locations(tree), str(path), "exec")))
        times = Counter(map(_place, codes))
        found |= {(str(path), *_place(c)): c for c in codes if times[_place(c)] == 1}
    return found


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _codes(code: CodeType) -> Iterable[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class _Telling(ast.NodeTransformer):
    """Puts a call with a number of its own where a function begins and where ways part."""

    def __init__(self, number: int) -> None:
        self.number = number

    def _call(self) -> ast.Call:
        self.number += 1
        return ast.Call(ast.Name(_HIT, ast.Load()), [ast.Constant(self.number)], [])

    def _told(self, value: ast.expr) -> ast.expr:
        return ast.BoolOp(ast.Or(), [self._call(), value])  # the call gives None

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if isinstance(node, (ast.FunctionDef, ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case)):
            first = node.body[0]
            says = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            node.body.insert(int(says and len(node.body) > 1), ast.Expr(self._call()))
        if isinstance(node, ast.If) and node.orelse:
            node.orelse.insert(0, ast.Expr(self._call()))
        if isinstance(node, ast.IfExp):
            node.body, node.orelse = self._told(node.body), self._told(node.orelse)
        if isinstance(node, ast.BoolOp):
            node.values[1:] = [self._told(v) for v in node.values[1:]]
        return node
