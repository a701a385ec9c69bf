"""What a pass is: a frozen dataclass, graph in, graph out, with a reason when it does not apply."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import fx

from thesean.errors import PassBroken, PassRefused
from thesean.passes.graph.dump import dump

Outcome = Literal["modified", "unchanged", "refused"]


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """`graph_module` is the same object that came in when `modified` is False; `reason` then says why."""

    graph_module: fx.GraphModule
    modified: bool
    reason: str = ""

    @classmethod
    def unchanged(cls, graph_module: fx.GraphModule, reason: str) -> Self:
        return cls(graph_module=graph_module, modified=False, reason=reason)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. `requires` raises PassRefused, `ensures` checks what `call` promised; `__call__` runs all three.

    `name` is the class's own in small letters ("bound-positions") unless it defines one. Each class says `in_place`:
    True hands back the module that came in, False leaves that one as it was; `__call__` raises PassBroken for one that
    does neither. A refusal and a result that isn't modified leave the graph as it was in any case.
    """

    name: ClassVar[str]
    in_place: ClassVar[bool]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "in_place", None), bool):
            raise TypeError(f"{cls.__name__}: expected in_place = True or False in the class, found neither.")
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def part(self) -> str:
        """The path of the part that it rewrites; "" for the whole graph."""
        return ""

    def requires(self, graph_module: fx.GraphModule) -> None:  # noqa: B027  most ask for nothing
        """Raises PassRefused, naming part, found and expected."""

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult: ...

    def ensures(self, graph_module: fx.GraphModule) -> None:
        graph_module.graph.lint()

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        before = _rows(graph_module.graph)
        try:
            self.requires(graph_module)
            result = self.call(graph_module)
        except PassRefused as refusal:
            self._expect(_rows(graph_module.graph) == before, "a refusal that leaves the graph as it was")
            dump(self.name, graph_module, f"refused: {refusal}", self.part)
            raise
        self._check_identity(graph_module, before, result)
        if result.modified:
            result.graph_module.recompile()
            self.ensures(result.graph_module)
        outcome = "modified" if result.modified else f"unchanged: {result.reason}"
        dump(self.name, result.graph_module, outcome, self.part)
        return result

    def _check_identity(self, came: fx.GraphModule, before: list[Any], result: PassResult) -> None:
        """What `in_place` and `modified` promise."""
        same = result.graph_module is came
        if not result.modified:
            self._expect(same and _rows(came.graph) == before, "an unmodified graph to be the one that came in")
        elif self.in_place:
            self._expect(same, "in_place = True to hand back the module that came in")
        else:
            self._expect(not same, "in_place = False to hand back another module")
            self._expect(_rows(came.graph) == before, "in_place = False to leave the graph that came in as it was")

    def _expect(self, kept: bool, promise: str) -> None:
        if not kept:
            raise PassBroken(f"{self.name}: expected {promise}; found otherwise. This is a defect of the pass.")


def _rows(graph: fx.Graph) -> list[Any]:
    """Equal as long as no node is added, erased, moved, renamed or given other arguments."""
    return [(n, n.name, n.target, n.args, n.kwargs) for n in graph.nodes]


class Attempt:
    """Passes of which a refusal is a note and no error. Where one refuses, the graph is what it was before the first:
    of several, all but the last must leave the incoming graph as it was.
    """

    def __init__(self, *passes: Pass) -> None:
        self.passes = passes


@dataclass(frozen=True, kw_only=True)
class Note:
    """What one pass did. `reason` says why it did nothing; "" where it rewrote the graph."""

    name: str
    part: str
    outcome: Outcome
    reason: str = ""


def run_passes(graph_module: fx.GraphModule, *passes: Pass | Attempt) -> tuple[fx.GraphModule, tuple[Note, ...]]:
    """One pass after another, and a note on each. A refusal ends the run with PassRefused, except in an Attempt."""
    notes: list[Note] = []
    for given in passes:
        before, kept = graph_module, len(notes)
        for step in given.passes if isinstance(given, Attempt) else (given,):
            outcome: Outcome
            try:
                result = step(graph_module)
            except PassRefused as refusal:
                if not isinstance(given, Attempt):
                    raise
                del notes[kept:]
                graph_module, outcome, reason = before, "refused", str(refusal)
            else:
                graph_module = result.graph_module
                outcome, reason = "modified" if result.modified else "unchanged", result.reason
            notes.append(Note(name=step.name, part=step.part, outcome=outcome, reason=reason))
            if outcome == "refused":
                break
    return graph_module, tuple(notes)
