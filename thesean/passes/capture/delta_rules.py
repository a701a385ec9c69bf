"""A guide's functions that compute the gated delta rule are one operator each while it is traced.

Such functions come as kernels with a fallback in torch, and have one calling convention: query, key, value, `g`, `beta`
and whether there is a state. Written out a fallback is a loop over chunks, which fixes the length, and hundreds of
operators a layer. Whether a function that is called so computes the rule is found out by numbers, not by its name.

B batch, T time, H heads, F width of queries and keys, K width of values
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any

import torch
from torch import nn

from thesean.passes.capture.explain import short
from thesean.passes.graph.opaque_delta_rule import GATED_DELTA_RULE

logger = logging.getLogger(__name__)

_READ = (("query", "key", "value"), ("q", "k", "v"))
_RATES = {"g", "beta"}
_STATE = {"initial_state", "output_final_state"}
_NORMED = "use_qk_l2norm_in_kernel"
# What says how it is computed, and not what.
_HOW = {"chunk_size"}

# inside the root of a norm, as the convention has it
_EPSILON = 1e-6

_EXACT = 1e-4  # of the output's largest value

Rule = Callable[..., Any]


@contextmanager
def delta_rules_as_operators(model: nn.Module) -> Iterator[None]:
    """Inside, functions that the code of `model` calls by the convention are the operator, where they are its equal."""
    places = [(place, name, rule) for place, name, rule in _functions(model) if _is_the_rule(rule)]
    for place, name, rule in places:
        setattr(place, name, _as_operator(rule))
    try:
        yield
    finally:
        for place, name, rule in places:
            setattr(place, name, rule)


def _functions(model: nn.Module) -> Iterator[tuple[Any, str, Rule]]:
    """Where each stands that has the convention's signature: in a file of the model's classes, or in a module."""
    classes = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    files = dict.fromkeys(kind.__module__ for kind in classes if not kind.__module__.startswith("torch."))
    places: list[Any] = [sys.modules[name] for name in files if name in sys.modules]
    for place in (*places, *model.modules()):
        for name, value in list(vars(place).items()):
            if isinstance(value, FunctionType) and _fits(value):
                yield place, name, value


def _fits(function: Rule) -> bool:
    try:
        names = tuple(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        return False
    return names[:3] in _READ and set(names) >= _RATES | _STATE


@torch.no_grad()
def _is_the_rule(function: Rule) -> bool:
    """By two lengths, one past a chunk, with queries and keys of length 1 and as they are where that is asked."""
    made = torch.Generator().manual_seed(0)
    norms = (True, False) if _NORMED in inspect.signature(function).parameters else (False,)
    tried = _as_operator(function)
    for steps, normed in ((3, norms[0]), (70, norms[-1])):
        query, key, value = (torch.randn(2, steps, 2, width, generator=made) for width in (4, 4, 3))
        key = key / key.norm(dim=-1, keepdim=True)
        beta, decay = (torch.rand(2, steps, 2, generator=made) for _ in range(2))
        given: dict[str, Any] = {"g": -decay, "beta": beta}
        given |= {_NORMED: normed} if _NORMED in inspect.signature(function).parameters else {}
        try:
            wanted, got = function(query, key, value, **given), tried(query, key, value, **given)
        except Exception as error:  # it may want a device, or other shapes
            logger.debug("%s is no delta rule: %s", getattr(function, "__name__", function), short(error))
            return False
        if not isinstance(wanted, tuple) or len(wanted) != 2 or wanted[1] is not None:
            return False
        if wanted[0].shape != got[0].shape or not (wanted[0] - got[0]).abs().max() <= _EXACT * wanted[0].abs().max():
            return False
    return True


def _as_operator(function: Rule) -> Rule:
    """The function, as the operator where it is called without a state."""
    signature = inspect.signature(function)
    called = next(names for names in _READ if names == tuple(signature.parameters)[:3])
    known = {*called, *_RATES, *_HOW, _NORMED}

    def rule(*args: Any, **kwargs: Any) -> Any:
        with suppress(TypeError):
            given = signature.bind(*args, **kwargs)
            rest = {k: v for k, v in given.arguments.items() if k not in known}
            more = [v for v in rest.values() if isinstance(v, dict)]
            if not any(map(_says, rest.values())) and not any(map(_says, (v for each in more for v in each.values()))):
                given.apply_defaults()
                read = given.arguments
                tensors = (*(read[name] for name in called), read["beta"], read["g"])
                if all(isinstance(x, torch.Tensor) for x in tensors):
                    return _operator(*tensors, normed=bool(read.get(_NORMED, False))), None
        return function(*args, **kwargs)

    return rule


def _says(value: Any) -> bool:
    """Whether an argument that isn't known asks for anything."""
    return isinstance(value, torch.Tensor) or not (isinstance(value, dict) or value is None or value is False)


def _operator(
    query_BTHF: torch.Tensor,
    key_BTHF: torch.Tensor,
    value_BTHK: torch.Tensor,
    beta_BTH: torch.Tensor,
    decay_BTH: torch.Tensor,
    *,
    normed: bool,
) -> torch.Tensor:
    """In float32; queries are scaled by their width, and heads of values may share one of queries and keys."""
    dtype = query_BTHF.dtype
    query_BTHF, key_BTHF, value_BTHK, beta_BTH, decay_BTH = (
        x.to(torch.float32) for x in (query_BTHF, key_BTHF, value_BTHK, beta_BTH, decay_BTH)
    )
    if normed:
        query_BTHF, key_BTHF = (
            x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPSILON) for x in (query_BTHF, key_BTHF)
        )
    shared = value_BTHK.shape[2] // query_BTHF.shape[2]
    if shared > 1:
        query_BTHF, key_BTHF = (x.repeat_interleave(shared, dim=2) for x in (query_BTHF, key_BTHF))
    query_BTHF = query_BTHF * query_BTHF.shape[-1] ** -0.5
    out_BTHK: torch.Tensor = GATED_DELTA_RULE(query_BTHF, key_BTHF, value_BTHK, beta_BTH, decay_BTH)
    return out_BTHK.to(dtype)
