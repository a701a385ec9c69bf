"""Batch norms as one operator that returns one tensor: torch's functionalisation takes them apart."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from thesean.passes.base import Pass, PassResult
from thesean.passes.graph.surgery import erase_dead

aten = torch.ops.aten


@dataclass(frozen=True)
class RejoinNorms(Pass):
    """_native_batch_norm_legit_no_training(x, ...)[0]  =>  batch_norm(x, ..., training=False)

    What else the operator returns is for training, and nobody reads it.
    """

    in_place = True

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        apart = graph_module.graph.find_nodes(
            op="call_function", target=aten._native_batch_norm_legit_no_training.default
        )
        if not apart:
            return PassResult.unchanged(graph_module, "no norm is in pieces")
        for norm in apart:
            *tensors, momentum, eps = norm.args
            for user in list(norm.users):
                if user.target is operator.getitem and user.args[1] == 0:
                    user.target, user.args = aten.batch_norm.default, (*tensors, False, momentum, eps, True)
        erase_dead(graph_module.graph)
        return PassResult(graph_module=graph_module, modified=True)
