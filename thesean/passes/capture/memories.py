"""A guide's functions that compute a recurrence of matrices are one operator each while it is traced.

Such functions are called as the kernels are whose place they take where there is no GPU, and written out they are loops
over time or chunks of it, which fix the length. What follows a kernel's calling convention may compute something else:
whether it is what the convention says is found out by numbers, and never by a name.

B batch, T time, H heads, G groups of heads, F width of queries and keys, K width of values, N states of a channel, P
channels of a head, D channels
"""

from __future__ import annotations

import dis
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from thesean.passes.capture.explain import short
from thesean.passes.capture.lengths import files_of
from thesean.passes.graph.opaque_memories import GATED_DELTA_RULE, SELECTIVE_SCAN, STATE_SPACE

logger = logging.getLogger(__name__)

_EXACT = 1e-4  # of the output's largest value

Given = Mapping[str, Any]
Function = Callable[..., Any]


class Convention(ABC):
    """How a kernel is called: what its first parameters may be named, and what others it `has`. It `knows` what it
    makes the operator of, and what says `how` it is computed alone; a call that says anything else is left as it is.
    """

    first: ClassVar[tuple[tuple[str, ...], ...]]
    has: ClassVar[frozenset[str]]
    knows: ClassVar[frozenset[str]]
    how: ClassVar[frozenset[str]] = frozenset()
    pair: ClassVar[bool] = False  # whether a state is returned too, None where it wasn't asked for

    def fits(self, function: Function) -> bool:
        names = tuple(_parameters(function))
        return any(names[: len(first)] == first for first in self.first) and self.has <= set(names)

    def read(self, function: Function, args: tuple[Any, ...], kwargs: Given) -> dict[str, Any] | None:
        """Arguments by the names of the convention; None for a call that says more than it knows."""
        try:
            given = inspect.signature(function).bind(*args, **kwargs)
        except TypeError:
            return None
        parameters = _parameters(function)
        renamed = dict(zip(parameters, self.first[0], strict=False))
        said = {renamed.get(k, k): v for k, v in given.arguments.items()}
        left = {k: parameters[k].default for k in self.knows - said.keys() if k in parameters}
        said |= {k: v for k, v in left.items() if v is not inspect.Parameter.empty}
        more = [] if _ignores_more(function) else [v for v in said.values() if isinstance(v, dict)]
        unknown = [v for k, v in said.items() if k not in self.knows | self.how | set(self.first[0])]
        if any(map(_says, (*unknown, *(v for each in more for v in each.values())))):
            return None
        return said if all(isinstance(said.get(name), torch.Tensor) for name in self.first[0]) else None

    @abstractmethod
    def operator(self, given: Given) -> torch.Tensor | None:
        """What is computed of these, in float32, and the operator in it; None where they have other shapes."""

    @abstractmethod
    def examples(self, function: Function) -> Iterator[dict[str, Any]]:
        """Arguments by which to tell whether a function computes that."""


class DeltaRule(Convention):
    """The gated delta rule, of queries and keys that may be taken to the length of 1, heads of values in groups. A head
    has one decay.
    """

    first = (("query", "key", "value"), ("q", "k", "v"))
    has = frozenset({"g", "beta", "initial_state", "output_final_state"})
    knows = frozenset({"g", "beta", "use_qk_l2norm_in_kernel"})
    how = frozenset({"chunk_size"})
    pair = True

    of_features: ClassVar[bool] = False

    _EPSILON = 1e-6  # inside the root of a norm

    def operator(self, given: Given) -> torch.Tensor | None:
        query_BTHF, key_BTHF, value_BTHK, beta_BTH, decay = (
            given[name].to(torch.float32) for name in ("query", "key", "value", "beta", "g")
        )
        if decay.ndim != (4 if self.of_features else 3):
            return None
        if given.get("use_qk_l2norm_in_kernel"):
            query_BTHF, key_BTHF = (
                x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self._EPSILON) for x in (query_BTHF, key_BTHF)
            )
        query_BTHF, key_BTHF = (_each_head(x, value_BTHK.shape[2]) for x in (query_BTHF, key_BTHF))
        query_BTHF = query_BTHF * query_BTHF.shape[-1] ** -0.5
        decay = _each_head(decay, value_BTHK.shape[2]) if self.of_features else decay
        out_BTHK: torch.Tensor = GATED_DELTA_RULE(query_BTHF, key_BTHF, value_BTHK, beta_BTH, decay)
        return out_BTHK

    def examples(self, function: Function) -> Iterator[dict[str, Any]]:
        normed, (q, k, v, *_) = "use_qk_l2norm_in_kernel", _parameters(function)
        for steps, flag in ((3, True), (70, False)):
            made = _Drawn(steps)
            key = made(2, 4)
            given = {q: made(2, 4), k: key / key.norm(dim=-1, keepdim=True), v: made(2, 3)}
            decays = made(2, 4) if self.of_features else made(2)
            given |= {"g": -decays.abs(), "beta": made(2).sigmoid()}
            yield given | ({normed: flag} if normed in _parameters(function) else {})


class DeltaRuleOfFeatures(DeltaRule):
    """The same with a decay for each feature of a key (Kimi Team 2025)."""

    of_features = True


class StateSpaceDual(Convention):
    """Mamba 2's: attention without a softmax, whose memory fades by one number a head (Dao and Gu 2024)."""

    first = (("x", "dt", "A", "B", "C"), ("hidden_states", "dt", "A", "B", "C"))
    has = frozenset({"chunk_size", "D", "dt_bias", "initial_states", "dt_softplus", "dt_limit"})
    knows = frozenset({"D", "dt_bias", "dt_softplus", "dt_limit"})
    how = frozenset({"chunk_size"})

    def operator(self, given: Given) -> torch.Tensor | None:
        x_BTHP, dt_BTH, skip_H = given["x"].to(torch.float32), given["dt"], given.get("D")
        if x_BTHP.ndim != 4 or (skip_H is not None and skip_H.ndim != 1):
            return None
        dt_BTH = _rates(dt_BTH, given.get("dt_bias"), given.get("dt_softplus"))
        least, most = given.get("dt_limit") or (0.0, float("inf"))
        dt_BTH = dt_BTH.clamp(least, None if most == float("inf") else most).to(torch.float32)
        key_BTHN, query_BTHN = (_each_head(given[name].to(torch.float32), x_BTHP.shape[2]) for name in ("B", "C"))
        decay_BTH = given["A"].to(torch.float32) * dt_BTH
        out_BTHP: torch.Tensor = STATE_SPACE(query_BTHN, key_BTHN, x_BTHP * dt_BTH.unsqueeze(-1), decay_BTH)
        return out_BTHP if skip_H is None else out_BTHP + skip_H.unsqueeze(-1) * x_BTHP

    def examples(self, function: Function) -> Iterator[dict[str, Any]]:
        for steps, groups in ((3, 1), (20, 2)):
            made = _Drawn(steps)
            given: dict[str, Any] = {"dt": made(4), "A": -made.row(4).abs(), "B": made(groups, 5), "C": made(groups, 5)}
            given |= {next(iter(_parameters(function))): made(4, 3), "chunk_size": 8, "dt_softplus": True}
            if groups == 1:
                yield given | {"D": made.row(4), "dt_bias": made.row(4)}
            else:
                yield given | {"dt_limit": (0.3, 0.9)}


class SelectiveScan(Convention):
    """Mamba's: each channel has states, which fade as fast as they each say (Gu and Dao 2023). Channels come first."""

    first = (("u", "delta", "A", "B", "C"), ("hidden_states", "dt", "A", "B", "C"))
    has = frozenset({"D", "z", "delta_bias", "delta_softplus", "return_last_state"})
    knows = frozenset({"D", "z", "delta_bias", "delta_softplus"})
    how = frozenset({"use_mambapy", "use_associative_scan"})

    def operator(self, given: Given) -> torch.Tensor | None:
        x_BDT, key_BNT, query_BNT = given["u"].to(torch.float32), given["B"], given["C"]
        if {x.ndim for x in (x_BDT, key_BNT, query_BNT)} != {3} or given["A"].ndim != 2:
            return None
        bias_D = given.get("delta_bias")
        dt_BDT = _rates(given["delta"], None if bias_D is None else bias_D.unsqueeze(-1), given.get("delta_softplus"))
        dt_BDT = dt_BDT.to(torch.float32)
        decay_BTDN = dt_BDT.transpose(1, 2).unsqueeze(-1) * given["A"].to(torch.float32)
        key_BTDN, query_BTDN = (
            x.to(torch.float32).transpose(1, 2).unsqueeze(2).expand_as(decay_BTDN) for x in (key_BNT, query_BNT)
        )
        value_BTD1 = (x_BDT * dt_BDT).transpose(1, 2).unsqueeze(-1)
        out_BDT: torch.Tensor = SELECTIVE_SCAN(query_BTDN, key_BTDN, value_BTD1, decay_BTDN).squeeze(-1).transpose(1, 2)
        if given.get("D") is not None:
            out_BDT = out_BDT + x_BDT * given["D"].unsqueeze(-1)
        return out_BDT if given.get("z") is None else out_BDT * F.silu(given["z"])

    def examples(self, function: Function) -> Iterator[dict[str, Any]]:
        x, dt, *_ = _parameters(function)
        for steps in (3, 20):
            made = _Drawn(steps)
            given = {x: made(4).mT, dt: made(4).mT, "A": -made.row(4, 5).abs(), "B": made(5).mT, "C": made(5).mT}
            if steps == 3:
                yield given | {"delta_softplus": True, "delta_bias": made.row(4), "D": made.row(4), "z": made(4).mT}
            else:
                yield given | {dt: made(4).mT.abs()}


CONVENTIONS: tuple[Convention, ...] = (DeltaRule(), DeltaRuleOfFeatures(), StateSpaceDual(), SelectiveScan())


@contextmanager
def memories_as_operators(model: nn.Module) -> Iterator[None]:
    """Inside, functions that the code of `model` calls by one of the conventions are its operator, where they are its
    equal.
    """
    places = list(_functions(model))
    made = {function: _as_operator(function) for _, _, function in places}  # once, in however many layers it stands
    places = [place for place in places if made[place[2]] is not None]
    for place, name, function in places:
        setattr(place, name, made[function])
    try:
        yield
    finally:
        for place, name, function in places:
            setattr(place, name, function)


def _functions(model: nn.Module) -> Iterator[tuple[Any, str, Function]]:
    """All that stand in a file of the model's classes, or in a module."""
    for place in (*files_of(model), *model.modules()):
        for name, value in list(vars(place).items()):
            if isinstance(value, FunctionType):
                yield place, name, value


@dataclass(frozen=True)
class _AsOperator:
    """The function, as the operator where it is called so. `halves`: whether what it makes of halves are halves."""

    function: Function
    convention: Convention
    halves: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.convention.read(self.function, args, kwargs)
        dtype = torch.float64 if given is None else given[self.convention.first[0][0]].dtype
        # whether a function widens doubles to less isn't known of it
        out = None if given is None or dtype == torch.float64 else self.convention.operator(given)
        if out is None:
            return self.function(*args, **kwargs)
        out = out.to(dtype) if self.halves else out
        return (out, None) if self.convention.pair else out


@torch.no_grad()
def _as_operator(function: Function) -> Function | None:
    """None for a function of no convention, and for one that computes something else."""
    return next((found for c in CONVENTIONS if c.fits(function) and (found := _by(c, function)) is not None), None)


def _by(convention: Convention, function: Function) -> Function | None:
    try:
        examples = list(convention.examples(function))
        if not all(_is_equal(function, convention, given) for given in examples):
            return None
        halved = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in examples[0].items()}
        out = function(**halved)
    except Exception as error:  # it may want a device, or other shapes
        logger.debug("%s is no such recurrence: %s", getattr(function, "__name__", function), short(error))
        return None
    return _AsOperator(function, convention, (out[0] if convention.pair else out).dtype == torch.bfloat16)


def _is_equal(function: Function, convention: Convention, given: Given) -> bool:
    wanted, read = function(**given), convention.read(function, (), given)
    got = None if read is None else convention.operator(read)
    if convention.pair:
        if not isinstance(wanted, tuple) or len(wanted) != 2 or wanted[1] is not None:
            return False
        wanted = wanted[0]
    if got is None or not isinstance(wanted, torch.Tensor) or wanted.shape != got.shape:
        return False
    return bool((wanted - got).abs().max() <= _EXACT * wanted.abs().max())


def _parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (ValueError, TypeError):
        return {}


def _says(value: Any) -> bool:
    """Whether an argument that isn't known asks for anything."""
    return not (isinstance(value, dict) or value is None or value is False)


def _ignores_more(function: Function) -> bool:
    """Whether whatever is given beside its own parameters is never looked at, as `**kwargs` often isn't."""
    more = [name for name, p in _parameters(function).items() if p.kind == inspect.Parameter.VAR_KEYWORD]
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not more or code is None or more[0] in code.co_cellvars:
        return False
    read = (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_FAST"))
    return not any(more[0] in (names if isinstance(names, tuple) else (names,)) for names in read)


class _Drawn:
    """Numbers of so many steps of two rows, or of none."""

    def __init__(self, steps: int) -> None:
        self.steps, self.generator = steps, torch.Generator().manual_seed(steps)

    def __call__(self, *widths: int) -> torch.Tensor:
        return self.row(2, self.steps, *widths)

    def row(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def _each_head(x_BTGF: torch.Tensor, heads: int) -> torch.Tensor:
    """One for each head, where several in a row share it."""
    shared = heads // x_BTGF.shape[2]
    return x_BTGF if shared == 1 else x_BTGF.repeat_interleave(shared, dim=2)


def _rates(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool | None) -> torch.Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt
