"""Forget the guide: fresh weights for everything that a hybrid took over from it, as a from-scratch baseline needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from thesean.passes.base import Pass, PassResult

aten = torch.ops.aten

_NORMS = (
    aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default, aten.group_norm.default,
    aten.native_layer_norm.default, aten.instance_norm.default,
)  # fmt: skip
# tables are small against unit-variance hidden states, as in GPT-2's own initialisation
_TABLE_STD = 0.02


@dataclass(frozen=True)
class Reinitialise(Pass):
    """W ~ N(0, 1 / fan_in) for matrices and kernels, N(0, 0.02^2) for tables, 1 and 0 for norms, 0 for biases.

    Reads each parameter's role off the operator that uses it; running statistics go back to mean 0, variance 1.
    Target modules keep the initialisation that their family gave them. Draws from torch's global generator.
    """

    in_place = True

    @torch.no_grad()
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        done: set[int] = set()
        # matrices first: a tied table and head is drawn as the table, which comes later and wins
        for node in sorted(graph_module.graph.find_nodes(op="get_attr"), key=lambda n: _is_table(n)):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if isinstance(value, nn.Parameter) or _user(node) in _NORMS:
                _fill(node, value, overwrite=_is_table(node), done=done)
        if not done:
            return PassResult.unchanged(graph_module, "the graph reads no parameters")
        return PassResult(graph_module=graph_module, modified=True)


def _user(node: fx.Node) -> object:
    return next(iter(node.users)).target if node.users else None


def _is_table(node: fx.Node) -> bool:
    return any(u.target is aten.embedding.default for u in node.users)


def _fill(node: fx.Node, value: torch.Tensor, overwrite: bool, done: set[int]) -> None:
    if id(value) in done and not overwrite:
        return
    done.add(id(value))
    user = next(iter(node.users), None)
    if user is not None and user.target in _NORMS:
        # arguments after the input: weight and running variance are ones, bias and running mean zeros
        place = list(user.args).index(node)
        ones = {1} if user.target is not aten.batch_norm.default else {1, 4}
        shift = 1 if user.target in (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default) else 0
        value.fill_(1.0 if place - shift in ones else 0.0)
    elif _is_table(node):
        value.normal_(0, _TABLE_STD)
    elif value.ndim >= 2:
        value.normal_(0, _fan_in(node, value) ** -0.5)
    elif _scales(node):
        value.fill_(1.0)
    else:
        value.zero_()


def _scales(node: fx.Node) -> bool:
    """A vector that multiplies: the gain of a norm that is spelled out."""
    return any(u.target in (aten.mul.Tensor, aten.mul_.Tensor) for u in node.users)


def _fan_in(node: fx.Node, value: torch.Tensor) -> int:
    """Inputs per output: `x @ w` and addmm have them in the first dimension, linear and convolutions in the rest."""
    user = next(iter(node.users), None)
    if user is not None and user.target in (aten.addmm.default, aten.mm.default, aten.matmul.default):
        return value.shape[0]
    return value[0].numel()
