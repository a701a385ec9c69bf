"""Solve a part's last linear layer: ridge regression onto the guide's activations, part after part.

For features f and residual r = guide's stream after the part - hybrid's stream before it (or simply the guide's output
of the part where it isn't added to a stream), minimise |W f + b - r|^2 + lambda |W - W0|^2 over W and b, with centred
statistics: dW = R_f' (C + lambda I)^-1; over W alone, with those about zero, where the layer has no bias. Solving for
the stream instead of the part's own output corrects what earlier parts left over. W0 is what the layer holds: zero
influence for fresh layers, the guide's weights for copied ones.

Lambda is chosen on examples that are held out (`ridge.py`). Rows far larger than others count by their relative error:
pretrained language models have first tokens whose stream is a thousand times as large as any other (Sun et al. 2024,
massive activations), and the norm that reads them divides by that.

N examples (tokens or images), E features, O outputs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from thesean import exchange, ranks
from thesean.distill.gathered import Gathered
from thesean.distill.joined import Given, joined
from thesean.distill.ridge import Ridge, held_out
from thesean.distill.seen import Seen, rows
from thesean.kernels.shared.precision import wide
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.walk import Walk
from thesean.passes.plan.hybrid import Hybrid, Replacement
from thesean.recipe import ClosedForm
from thesean.targets import TargetModule
from thesean.targets.shared.module import MaskReader
from thesean.targets.shared.sequence import SequenceTarget

Inputs = dict[str, torch.Tensor]

# Of the rows' median norm. Ordinary rows differ by a factor of two.
_LARGE = 8.0

# Forwards that, without a state, are `complete` of the features.
_COMPLETED = (TargetModule.forward, MaskReader.forward, SequenceTarget.forward)


def solve_parts(
    guide: fx.GraphModule,
    hybrid: Hybrid,
    parts: Sequence[int],
    batches: Sequence[Inputs],
    *,
    ridge: float,
    solve_copied: bool = True,
) -> list[str]:
    """Refit the last layers of `parts`, in order; returns the modules solved. Leaves train/eval flags as they were."""
    solver = Solver(guide, hybrid, parts, batches, ridge=ridge, solve_copied=solve_copied)
    return [name for part in parts for name in solver.solve(part)]


def solver_by(
    form: ClosedForm,
    guide: fx.GraphModule,
    hybrid: Hybrid,
    parts: Sequence[int],
    batches: Sequence[Inputs],
    preparing: bool,
    alone: bool = False,
) -> Solver:
    """As a recipe's closed form says; it prepares alone where that is off."""
    return Solver(
        guide,
        hybrid,
        parts,
        batches,
        ridge=form.ridge if form.enabled else None,
        solve_copied=form.solve_copied,
        preparing=preparing,
        alone=alone,
    )


class Solver:
    """Prepares and refits modules part after part, in the order of `parts`: guide and hybrid are walked through once
    for all of them, whatever their number.

    `preparing` parts are shown the guide's activations first. Between two parts nothing else may change the hybrid.
    """

    def __init__(
        self,
        guide: fx.GraphModule,
        hybrid: Hybrid,
        parts: Sequence[int],
        batches: Sequence[Inputs],
        *,
        ridge: float | None,
        solve_copied: bool = True,
        preparing: bool = False,
        alone: bool = False,
    ) -> None:
        """`ridge` None: only prepare. `alone`: each module is to stand alone in the guide, and reads the guide's values
        in place of the hybrid's: the replacements name the guide's nodes.
        """
        self.hybrid, self.batches, self.ridge, self.alone = hybrid, batches, ridge, alone
        replaced = [r for part in parts for r in hybrid.of_part(part)]
        self._prepared = {r.name for r in replaced if preparing and prepares(hybrid.module(r))}
        self._solved = {
            r.name
            for r in replaced
            if ridge is not None and last_of(hybrid.module(r)) and (solve_copied or "output" not in r.copied)
        }
        self._own_step = {r.name: i for i, r in enumerate(r for r in replaced if r.name in self._solved)}
        ends = [pair for part in parts for pair in self._guide_ends(hybrid.of_part(part))]
        self._guide_step = {key: step for step, (key, _) in enumerate(ends)}
        self._seen, self._gathered = Seen(guide), Gathered(guide)
        self._theirs = Walk(guide, [[*names, *self._seen.names] for _, names in ends], batches)
        read = [] if alone else [_own_ends(r) for r in replaced if r.name in self._solved]
        self._own = Walk(hybrid.graph_module, read, batches)

    @torch.no_grad()
    def solve(self, part: int) -> list[str]:
        """The modules of this part that were solved. Leaves train/eval flags as they were."""
        replaced = self.hybrid.of_part(part)
        for r in replaced:
            if r.name in self._prepared:
                module = self.hybrid.module(r)
                assert isinstance(module, TargetModule)
                module.prepare(r.facts, self._examples(r))
        solved = [r for r in replaced if r.name in self._solved]
        with evaluating(self.hybrid.graph_module):
            for r in solved:
                self._solve(r)
        return [r.name for r in solved]

    def _guide_ends(self, replaced: Sequence[Replacement]) -> list[tuple[tuple[str, str], list[str]]]:
        """The steps that a part takes through the guide, in order."""
        prepared = [(("prepare", r.name), [r.guide_entry, r.guide_exit]) for r in replaced if r.name in self._prepared]
        solved = [r for r in replaced if r.name in self._solved]
        own = [_own_ends(r) if self.alone else [] for r in solved]
        return [*prepared, *((("solve", r.name), [_wanted(r), *more]) for r, more in zip(solved, own, strict=True))]

    def _examples(self, r: Replacement) -> list[tuple[torch.Tensor, torch.Tensor]]:
        step = self._guide_step["prepare", r.name]
        values = (self._theirs.get(step, number) for number in range(len(self.batches)))
        return [pair for v in values for pair in self._examples_in(r, v)]

    def _examples_in(self, r: Replacement, values: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._seen.examples(r, self._gathered.values(values))

    def _solve(self, r: Replacement) -> None:
        module = self.hybrid.module(r)
        assert isinstance(module, TargetModule)
        assert self.ridge is not None
        own_step, completed = self._own_step[r.name], _Completed(module, 0 if self.alone else self._own.budget // 2)
        regression, limit = Ridge(module.last), None
        batch_first, seen = _batch_first(r), 0
        apart = not batch_first or ranks.count() > 1  # ranks tell each other of each batch, in one order
        for some in joined((self._given(r, number) for number in range(len(self.batches))), apart):
            features, _ = features_of_rows(module, some.x, some.read_BT)
            skip = module.skip(some.x)
            summed = module.wanted(some.x, some.residual)
            wanted = module.unshape(summed if skip is None else summed - skip)
            target = rows(module.unshape(some.target), some.mask_BT)
            size_N = target.reshape(-1, module.last.out_features).norm(dim=1)
            if limit is None:
                limit = _LARGE * float(exchange.gather(size_N[: some.first(len(size_N))]).median())
            weight_N = (limit / size_N).clamp(max=1.0).square() if limit else None
            before, of_all = exchange.place(len(some.x)) if batch_first else (0, 1)
            first, own = seen + before, len(some.x) if batch_first else 1
            apart_N = held_out(range(first, first + own), len(size_N), some.mask_BT if batch_first else None)
            seen += of_all
            regression.add(rows(features, some.mask_BT), rows(wanted, some.mask_BT), apart_N, weight_N)
            completed.keep(some, features)
        for statistics in regression.statistics:
            exchange.add_up(statistics, "statistics")
        regression.solve(self.ridge, r.facts.path)
        if self.alone:
            return  # nothing else reads what it makes
        if self._own.has_run(r.exit, own_step):
            self._own.forget()  # parts in an order that is not the network's
        elif type(module).forward in _COMPLETED:
            (call,) = self.hybrid.graph_module.graph.find_nodes(op="call_module", target=r.name)
            for number, made in completed.outputs():
                self._own.put(call.name, number, made)

    def _given(self, r: Replacement, number: int) -> Given:
        want, theirs = _wanted(r), self._theirs.get(self._guide_step["solve", r.name], number)
        mine = theirs if self.alone else self._own.get(self._own_step[r.name], number)
        target = wide(theirs[want])  # what is subtracted from it in half precision would be lost
        residual = target - mine[r.join[1]] if r.join else target
        read_BT, mask_BT = self._seen.read_by(r, theirs), self._seen.of(want, theirs)
        x = mine[r.entry]
        return Given((number,), (len(x),), x, target, residual, read_BT, mask_BT)


class _Completed:
    """What a module made of its inputs, so that its output after solving costs no more than the last layer."""

    def __init__(self, module: TargetModule, budget: int) -> None:
        """In bytes."""
        self.module, self.budget = module, budget
        self._kept: list[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = []

    def keep(self, some: Given, features: torch.Tensor) -> None:
        """Of as many batches as fit."""
        self.budget -= features.untyped_storage().nbytes()
        if self.budget >= 0:
            read = () if some.read_BT is None else (some.read_BT,)
            self._kept.append((some.numbers, some.sizes, (some.x, features, None, *read)))

    def outputs(self) -> Iterator[tuple[int, Any]]:
        """By the number of the batch, each once; without the state, which nothing in a hybrid reads."""
        while self._kept:
            numbers, sizes, made = self._kept.pop(0)
            y = self.module.complete(*made)
            y = y[0] if self.module.stateful else y
            for number, own in zip(numbers, y.split(sizes), strict=True):
                yield number, (own, None) if self.module.stateful else own


def features_of_rows(module: TargetModule, x: torch.Tensor, mask_BT: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """A module's features and state, with what it is told of padded steps."""
    if mask_BT is None:
        return module.features(x)
    assert isinstance(module, MaskReader)
    return module.masked_features(x, None, mask_BT)


def prepares(module: torch.nn.Module) -> bool:
    """Whether it chooses anything by the guide's activations."""
    return isinstance(module, TargetModule) and type(module).prepare is not TargetModule.prepare


def last_of(module: torch.nn.Module) -> torch.nn.Linear | None:
    """The layer to solve, where there is one."""
    return module.last if isinstance(module, TargetModule) and hasattr(module, "last") else None


def _batch_first(r: Replacement) -> bool:
    return all(str(shape[0]).startswith("batch") for shape in (r.facts.input_shape, r.facts.output_shape))


def _own_ends(r: Replacement) -> list[str]:
    return [r.entry, *(r.join[1:] if r.join else ())]


def _wanted(r: Replacement) -> str:
    return r.guide_join if r.join and r.guide_join else r.guide_exit


@torch.no_grad()
def solve_alone(
    module: torch.nn.Module, examples: Sequence[tuple[torch.Tensor, torch.Tensor]], *, ridge: float, where: str
) -> bool:
    """Refit a module's last layer on (input, wanted output) pairs; whether it has one. Leaves train/eval flags as they
    were.
    """
    if not isinstance(module, TargetModule) or not hasattr(module, "last"):
        return False
    with evaluating(module):
        regression, seen = Ridge(module.last), 0
        for x, wanted in examples:
            features, _ = module.features(x)
            skip = module.skip(x)
            want = module.wanted(x, wide(wanted))
            residual = module.unshape(want if skip is None else want - skip)
            apart_N = held_out(range(seen, seen + len(x)), features.numel() // module.last.in_features)
            seen += len(x)
            regression.add(features, residual, apart_N)
        regression.solve(ridge, where)
    return True
