"""Solve a part's last linear layer: ridge regression onto the guide's activations, part after part.

For features f and residual r = guide's stream after the part - hybrid's stream before it (or simply the guide's output
of the part where it isn't added to a stream), minimise |W f + b - r|^2 + lambda |W - W0|^2 over W and b, with centred
statistics: dW = R_f' (C + lambda I)^-1. Solving for the stream instead of the part's own output corrects what earlier
parts left over. W0 is what the layer holds: zero influence for fresh layers, the guide's weights for copied ones.

Some examples are held out: lambda is the one of a few that does best on them, and a layer that no solution brings
nearer there stays as it is. Rows far larger than others count by their relative error: pretrained language models have
first tokens whose stream is a thousand times as large as any other (Sun et al. 2024, massive activations), and the norm
that reads them divides by that.

N examples (tokens or images), E features, O outputs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional as F

from thesean import ranks
from thesean.distill.gathered import Gathered
from thesean.distill.joined import Given, joined
from thesean.distill.seen import Seen, rows
from thesean.errors import NumericalError
from thesean.kernels.shared.precision import wide
from thesean.passes.graph.modes import evaluating
from thesean.passes.graph.walk import Walk
from thesean.passes.plan.hybrid import Hybrid, Replacement
from thesean.recipe import ClosedForm
from thesean.targets import TargetModule
from thesean.targets.shared.module import MaskReader
from thesean.targets.shared.sequence import SequenceTarget

Inputs = dict[str, torch.Tensor]

# Tried on what is held out, as factors of the recipe's own, which is the least.
_RIDGES = (1.0, 10.0, 100.0)
_HELD_OUT = 4  # one example in so many

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
    reading: fx.GraphModule | None = None,
) -> Solver:
    """As a recipe's closed form says; it prepares alone where that is off."""
    ridge, told = form.ridge if form.enabled else None, {"solve_copied": form.solve_copied, "preparing": preparing}
    return Solver(guide, hybrid, parts, batches, ridge=ridge, reading=reading, **told)


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
        reading: fx.GraphModule | None = None,
    ) -> None:
        """`ridge` None: prepare alone. `reading`: the network whose values modules read, in place of the hybrid, whose
        replacements then name its nodes: the guide, where each is to stand alone in it.
        """
        self.hybrid, self.batches, self.ridge = hybrid, batches, ridge
        replaced = [r for part in parts for r in hybrid.of_part(part)]
        self._prepared = {r.name for r in replaced if preparing and prepares(hybrid.module(r))}
        self._solved = {
            r.name
            for r in replaced
            if ridge is not None and _last(hybrid.module(r)) and (solve_copied or "output" not in r.copied)
        }
        self._own_step = {r.name: i for i, r in enumerate(r for r in replaced if r.name in self._solved)}
        read = [_own_ends(r) for r in replaced if r.name in self._solved]
        self._own = Walk(hybrid.graph_module if reading is None else reading, read, batches)
        ends = [pair for part in parts for pair in self._guide_ends(hybrid.of_part(part))]
        self._guide_step = {key: step for step, (key, _) in enumerate(ends)}
        self._seen, self._gathered = Seen(guide), Gathered(guide)
        self._theirs = Walk(guide, [[*names, *self._seen.names] for _, names in ends], batches)

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
        return [*prepared, *((("solve", r.name), [_wanted(r)]) for r in replaced if r.name in self._solved)]

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
        own_step, completed = self._own_step[r.name], _Completed(module, self._own.budget // 2)
        sums, held_out, limit = _Sums(module.last), _Sums(module.last), None
        batch_first, seen = _batch_first(r), 0
        apart = not batch_first or ranks.count() > 1  # ranks tell each other of each batch, in one order
        for some in joined((self._given(r, number) for number in range(len(self.batches))), apart):
            features, _ = features_of_rows(module, some.x, some.read_BT)
            skip = module.skip(some.x)
            wanted = module.unshape(some.residual if skip is None else some.residual - skip)
            target = rows(module.unshape(some.target), some.mask_BT)
            size_N = target.reshape(-1, module.last.out_features).norm(dim=1)
            if limit is None:
                limit = _LARGE * float(ranks.gather(size_N[: some.first(len(size_N))]).median())
            weight_N = (limit / size_N).clamp(max=1.0).square() if limit else torch.ones_like(size_N)
            before, of_all = ranks.place(len(some.x)) if batch_first else (0, 1)
            units = range(seen + before, seen + before + (len(some.x) if batch_first else 1))
            apart_N = _apart(units, size_N, some.mask_BT if batch_first else None)
            seen += of_all
            f_NE = rows(features, some.mask_BT).reshape(-1, module.last.in_features)
            r_NO = rows(wanted, some.mask_BT).reshape(-1, module.last.out_features)
            for found, at in ((sums, ~apart_N), (held_out, apart_N)):
                found.add(f_NE[at], r_NO[at], weight_N[at])
            completed.keep(some, features)
        for found in (sums, held_out):
            ranks.add_up(found.all, "statistics")
        sums.solve(self.ridge, r.facts.path, held_out)
        if self._own.has_run(r.exit, own_step):
            self._own.forget()  # parts in an order that is not the network's
        elif type(module).forward in _COMPLETED:
            (call,) = self.hybrid.graph_module.graph.find_nodes(op="call_module", target=r.name)
            for number, made in completed.outputs():
                self._own.put(call.name, number, made)

    def _given(self, r: Replacement, number: int) -> Given:
        want, theirs = _wanted(r), self._theirs.get(self._guide_step["solve", r.name], number)
        mine = self._own.get(self._own_step[r.name], number)
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


def _last(module: torch.nn.Module) -> bool:
    """Whether there is a last layer to solve."""
    return isinstance(module, TargetModule) and hasattr(module, "last")


def _batch_first(r: Replacement) -> bool:
    return all(str(shape[0]).startswith("batch") for shape in (r.facts.input_shape, r.facts.output_shape))


def _own_ends(r: Replacement) -> list[str]:
    return [r.entry, *(r.join[1:] if r.join else ())]


def _wanted(r: Replacement) -> str:
    return r.guide_join if r.join and r.guide_join else r.guide_exit


def _apart(units: range, like_N: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Which of N rows are held out: those of one in so many of the units, examples or batches, that they are of."""
    apart_B = torch.tensor([unit % _HELD_OUT == 1 for unit in units], device=like_N.device)
    if mask_BT is not None:
        return rows(apart_B.unsqueeze(1).expand_as(mask_BT), mask_BT)
    return apart_B.repeat_interleave(len(like_N) // len(units))


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
        sums, held_out, seen = _Sums(module.last), _Sums(module.last), 0
        for x, wanted in examples:
            features, _ = module.features(x)
            skip = module.skip(x)
            want = wide(wanted)
            f_NE = features.reshape(-1, module.last.in_features)
            r_NO = module.unshape(want if skip is None else want - skip).reshape(-1, module.last.out_features)
            apart_N = _apart(range(seen, seen + len(x)), f_NE)
            seen += len(x)
            sums.add(f_NE[~apart_N], r_NO[~apart_N])
            held_out.add(f_NE[apart_N], r_NO[apart_N])
        sums.solve(ridge, where, held_out)
    return True


class _Sums:
    """Running statistics of features and residuals, in double: fp32 loses the small eigenvalues."""

    def __init__(self, last: torch.nn.Linear) -> None:
        self.last = last
        like = last.weight.new_zeros((), dtype=torch.float64)
        self.count = like.clone()
        self.features_E = like.new_zeros(last.in_features)
        self.errors_O = like.new_zeros(last.out_features)
        self.covariance_EE = like.new_zeros(last.in_features, last.in_features)
        self.cross_EO = like.new_zeros(last.in_features, last.out_features)

    def add(self, features: torch.Tensor, residual: torch.Tensor, weight_N: torch.Tensor | None = None) -> None:
        """`weight_N`: how much the squared error of a row counts."""
        f_NE = features.reshape(-1, self.last.in_features)
        r_NO = residual.reshape(-1, self.last.out_features)
        error_NO = (r_NO - F.linear(wide(f_NE), wide(self.last.weight), self._bias)).double()
        f_NE = f_NE.double()
        counted_NE = f_NE if weight_N is None else f_NE * weight_N.double().unsqueeze(1)
        self.count += f_NE.shape[0] if weight_N is None else weight_N.double().sum()
        self.features_E += counted_NE.sum(0)
        self.errors_O += error_NO.sum(0) if weight_N is None else weight_N.double() @ error_NO
        self.covariance_EE.addmm_(counted_NE.T, f_NE)
        self.cross_EO.addmm_(counted_NE.T, error_NO)

    def solve(self, ridge: float, where: str, held_out: _Sums | None = None) -> None:
        """With rows `held_out`, the ridge is chosen on them and the layer stays where none helps; then they are fitted
        too.
        """
        if held_out is not None and held_out.count > 0:
            # which is the best takes no more digits than single precision has, and that takes half the time
            own, theirs = self._centred(where).single(), held_out._centred(where).single()
            gains = {factor: self._solution(own, factor * ridge).gain(theirs) for factor in _RIDGES}
            best = min(gains, key=gains.__getitem__)
            if gains[best] >= 0:
                return
            ridge *= best
            for mine, more in zip(self.all, held_out.all, strict=True):
                mine += more
        solution = self._solution(self._centred(where), ridge)
        # added before it is rounded to the layer's precision
        weight_OE = wide(self.last.weight)
        self.last.weight.copy_(weight_OE + solution.weight_EO.T.to(weight_OE.dtype))
        if self._bias is not None:
            self.last.bias.copy_(self._bias + solution.bias_O.to(weight_OE.dtype))

    def _solution(self, statistics: _Centred, ridge: float) -> _Solution:
        mean_E, mean_O, covariance_EE, cross_EO = statistics
        penalised_EE = covariance_EE.clone()
        penalised_EE.diagonal().add_(ridge * covariance_EE.diagonal().mean().clamp_min(1e-12))
        delta_EO = _solved(penalised_EE, cross_EO)
        bias_O = mean_O - mean_E @ delta_EO if self._bias is not None else torch.zeros_like(mean_O)
        return _Solution(delta_EO, bias_O)

    def _centred(self, where: str) -> _Centred:
        finite = (self.covariance_EE, self.cross_EO)
        if not all(bool(torch.isfinite(statistic).all()) for statistic in finite):
            raise NumericalError(
                f"{where}: activations are not finite, so its last layer can't be solved. Look for NaN in the data."
            )
        mean_E, mean_O = self.features_E / self.count, self.errors_O / self.count
        covariance_EE = (self.covariance_EE / self.count).addr_(mean_E, mean_E, alpha=-1)
        cross_EO = (self.cross_EO / self.count).addr_(mean_E, mean_O, alpha=-1)
        return _Centred(mean_E, mean_O, covariance_EE, cross_EO)

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.count, self.features_E, self.errors_O, self.covariance_EE, self.cross_EO

    @property
    def _bias(self) -> torch.Tensor | None:
        return None if self.last.bias is None else wide(self.last.bias)


class _Centred(NamedTuple):
    """Means of features and errors, the covariance of the features and theirs with the errors."""

    mean_E: torch.Tensor
    mean_O: torch.Tensor
    covariance_EE: torch.Tensor
    cross_EO: torch.Tensor

    def single(self) -> _Centred:
        return _Centred(*(statistic.float() for statistic in self))


class _Solution(NamedTuple):
    """What is added to a layer's weight and bias."""

    weight_EO: torch.Tensor
    bias_O: torch.Tensor

    def gain(self, rows: _Centred) -> float:
        """By how much it changes the mean squared error of some rows: below 0 where it helps."""
        mean_E, mean_O, covariance_EE, cross_EO = rows
        spread = torch.addmm(cross_EO, covariance_EE, self.weight_EO, beta=-2).mul_(self.weight_EO).sum()
        offset_O = mean_O - mean_E @ self.weight_EO - self.bias_O
        return float(spread + offset_O.square().sum() - mean_O.square().sum())


def _solved(penalised_EE: torch.Tensor, cross_EO: torch.Tensor) -> torch.Tensor:
    """A covariance and its ridge are positive definite, unless rounding took all that the ridge added."""
    root_EE, failed = torch.linalg.cholesky_ex(penalised_EE)
    return torch.linalg.solve(penalised_EE, cross_EO) if int(failed) else torch.cholesky_solve(cross_EO, root_EE)
