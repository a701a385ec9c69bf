"""Plans for several budgets, from one probing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from thesean.choose.constraints import Constraints
from thesean.passes.plan.plan import Plan


class Plans(Sequence[Plan]):
    """What `thesean.plan` returns for a list of budgets: a plan for each, in their order.

    Each is a Plan as any other: `compile(model, plan=plans[0], ...)` converts by it. `print(plans)` says what each
    costs and loses, `print(plans[0])` all that was tried.
    """

    def __init__(self, plans: Sequence[Plan], constraints: Sequence[Constraints]) -> None:
        self._plans, self.constraints = tuple(plans), tuple(constraints)

    def __len__(self) -> int:
        return len(self._plans)

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> Plans: ...
    def __getitem__(self, index: int | slice) -> Plan | Plans:
        if isinstance(index, slice):
            return Plans(self._plans[index], self.constraints[index])
        return self._plans[index]

    def __str__(self) -> str:
        lines = []
        for asked, plan in zip(self.constraints, self._plans, strict=True):
            replaced = f"{len(plan.replaced)} of {len(plan)} parts replaced"
            lines += [f"{asked}: {replaced}, {plan.new_params:,} parameters", *(f"- {note}" for note in plan.notes), ""]
        return "\n".join(lines[:-1])

    def __repr__(self) -> str:
        return f"<Plans for {'; '.join(map(str, self.constraints))}>"
