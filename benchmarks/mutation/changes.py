"""The small faults that code could have: one comparison, one constant, one statement is another.

Only bodies of functions are changed, so that a process which has imported everything can take a fault up: the code of
live functions is replaced. What an error says, annotations, assertions and docstrings are left alone.
"""

from __future__ import annotations

import ast
import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Mult,
}  # fmt: skip
_KIN = {"min": "max", "max": "min", "any": "all", "all": "any"}
_ASSERTS = "strict"  # of zip, as `assert` does
_TOLD = {"logger", "logging", "warn", "warnings"}  # calls that only tell

Change = tuple[str, Callable[[], None]]  # what it is, and how it is done to the tree


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one function; `number` counts the changes of a file in the order of its tree."""

    file: str
    number: int
    line: int
    last_line: int
    function: tuple[str, int]  # the outermost one: its qualified name, and the line at which its code begins
    what: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.what} ({self.number})"


def mutants(path: Path, file: str) -> list[Mutant]:
    """Of a file, by the name that it is to have."""
    found = []
    for number, (function, statement, (what, _)) in enumerate(_changes(ast.parse(path.read_text(encoding="utf-8")))):
        body = getattr(statement, "body", None)  # of an `if` or a loop its head alone
        last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno
        place = {"line": statement.lineno, "last_line": last}
        found.append(Mutant(file=file, number=number, function=function, what=what, **place))
    return found


def drawn(every: Iterable[Mutant], seed: int, count: int) -> list[Mutant]:
    """The `count` first by a hash of what each changes and where: by its function, not its line, so that a draw stays
    while the code around it moves.
    """
    alike: Counter[tuple[str, str, str]] = Counter()
    places: list[tuple[str, Mutant]] = []
    for mutant in every:
        place = (mutant.file, mutant.function[0], mutant.what)
        text = " ".join([str(seed), *place, str(alike[place])])
        places.append((hashlib.sha256(text.encode()).hexdigest(), mutant))
        alike[place] += 1
    return [mutant for _, mutant in sorted(places, key=lambda place: place[0])[:count]]


def now(name: str, every: Iterable[Mutant]) -> Mutant | None:
    """The fault of this name in code that has changed since: of those that change the same in its file the nearest."""
    place, _, what = name.partition(" ")
    file, _, line = place.rpartition(":")
    alike = [m for m in every if m.file == file and m.what == what.rpartition(" (")[0]]
    return min(alike, key=lambda m: abs(m.line - int(line)), default=None)


class Live:
    """The functions that there are, by file, name and line: to take up a fault is to replace the code of one."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, str, int], list[FunctionType]] = {}
        gc.unfreeze()  # what tests have frozen is found again
        # `is`: there are objects that import a module where they are asked for their class
        for function in [f for f in gc.get_objects() if type(f) is FunctionType]:
            own = function.__code__
            place = (own.co_filename, own.co_qualname, own.co_firstlineno)
            self.functions.setdefault(place, []).append(function)
        gc.freeze()

    def take_up(self, mutant: Mutant, path: Path) -> bool:
        """Replace the code of all that it changes. False where none can: its closure is another. Raises LookupError
        where nothing of the file was found.
        """
        tree = ast.parse(path.read_text(encoding="utf-8"))
        _, _, (_, change) = next(c for number, c in enumerate(_changes(tree)) if number == mutant.number)
        change()
        code = compile(ast.fix_missing_locations(tree), str(path), "exec")
        changed = next((c for c in _codes(code) if (c.co_qualname, c.co_firstlineno) == mutant.function), None)
        taken = False
        if not any(file == str(path) for file, *_ in self.functions):
            raise LookupError(f"{mutant.name}: nothing of {path} is there")
        for own in _codes(changed) if changed is not None else ():  # those within live on where it has made some
            for function in self.functions.get((str(path), own.co_qualname, own.co_firstlineno), []):
                try:
                    function.__code__ = own
                    taken = True
                except ValueError:  # another number of free variables
                    if own is changed:
                        return False
        return taken


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _changes(tree: ast.Module) -> Iterator[tuple[tuple[str, int], ast.stmt, Change]]:
    """The outermost function, the statement and the change, of each there is."""
    for name, function in functions_of(tree.body):
        first = min([d.lineno for d in function.decorator_list], default=function.lineno)
        for statement in function.body:
            for inner, change in _within(statement, function, "body", statement):
                yield (name, first), inner, change


def functions_of(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The outermost functions of a module, and the methods of its classes, by their qualified names."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            yield prefix + statement.name, statement
        elif isinstance(statement, ast.ClassDef):
            yield from functions_of(statement.body, f"{prefix}{statement.name}.")


def _within(node: ast.AST, parent: ast.AST, field: str, statement: ast.stmt) -> Iterator[tuple[ast.stmt, Change]]:
    """The changes of a node and of what is in it. `statement` is the one that it belongs to."""
    if isinstance(node, ast.stmt):
        statement = node
    told = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _root(node.value.func) in _TOLD
    if told or isinstance(node, (ast.Assert, ast.JoinedStr)) or (isinstance(node, ast.Expr) and _is_text(node.value)):
        return
    if isinstance(node, ast.keyword) and node.arg == _ASSERTS:
        return
    for change in _of(node, parent, field):
        yield statement, change
    if isinstance(node, ast.Raise):  # what it says is another matter
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment", "args") and not isinstance(
            node, ast.Call
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _within(child, node, name, statement)


def _root(function: ast.expr) -> str:
    while isinstance(function, ast.Attribute):
        function = function.value
    return function.id if isinstance(function, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _of(node: ast.AST, parent: ast.AST, field: str) -> Iterator[Change]:
    """What may be changed of this very node."""

    def put(new: ast.AST) -> Callable[[], None]:
        def do() -> None:
            held = getattr(parent, field)
            if isinstance(held, list):
                held[next(k for k, v in enumerate(held) if v is node)] = new
            else:
                setattr(parent, field, new)

        return do

    def setting(what: Any, name: str, value: Any) -> Callable[[], None]:
        return lambda: setattr(what, name, value)

    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in _COMPARISONS:
            other = _COMPARISONS[type(op)]()
            yield f"{type(op).__name__} -> {type(other).__name__}", lambda: node.ops.__setitem__(0, other)
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            another = _ARITHMETIC[type(op)]()
            yield f"{type(op).__name__} -> {type(another).__name__}", setting(node, "op", another)
        case ast.BoolOp(op=op):
            junction = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield f"{type(op).__name__} -> {type(junction).__name__}", setting(node, "op", junction)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield f"no {type(node.op).__name__}", put(operand)
        case ast.Constant(value=bool(value)):
            yield f"{value} -> {not value}", setting(node, "value", not value)
        case ast.Constant(value=int(number) | float(number)):
            yield f"{number} -> {number + 1}", setting(node, "value", number + 1)
        case ast.Constant(value=str(text)):
            yield f"{text!r:.20} -> another", setting(node, "value", text + "_")
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield "condition negated", setting(node, "test", ast.UnaryOp(op=ast.Not(), operand=test))
        # a constant has a change of its own, and None for False or "" is the same to a condition
        case ast.Return(value=ast.expr() as given) if not isinstance(given, ast.Constant):
            yield "returns None", setting(node, "value", ast.Constant(value=None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Delete():
            yield f"no {type(node).__name__}", put(ast.Pass())
        case ast.Break():
            yield "break -> continue", put(ast.Continue())
        case ast.comprehension(ifs=[_, *_]):
            yield "no filter", setting(node, "ifs", [])
        case ast.Call(func=func, keywords=keywords):
            if isinstance(func, ast.Name) and func.id in _KIN:
                yield f"{func.id} -> {_KIN[func.id]}", setting(func, "id", _KIN[func.id])
            for keyword in keywords:
                if keyword.arg not in (None, _ASSERTS):
                    yield f"no {keyword.arg}=", lambda k=keyword: keywords.remove(k)  # type: ignore[misc]
