"""The guides of tests/models.py as graphs, traced once for all tests; nobody may change them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import pytest
import torch
from torch import fx, nn

from tests import models
from tests.kept_captures import capture
from tests.models import tokens, vectors
from thesean.passes.analyse.dataflow import DataFlow, data_flow
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.record import record
from thesean.passes.graph.signature import InputSpec, Signature

# torch's fused attention, and softmax written out: the same checks, so that one is enough while one works
KERNELS = ["sdpa", pytest.param("eager", marks=pytest.mark.thorough)]

P = ParamSpec("P")
R = TypeVar("R")


def shared(make: Callable[P, R]) -> Callable[P, R]:
    """One value for equal settings, whether they were given, and how, or are the defaults."""
    kept, signature = cache(make), inspect.signature(make)

    @wraps(make)
    def value(*args: P.args, **settings: P.kwargs) -> R:
        bound = signature.bind(*args, **settings)
        bound.apply_defaults()
        return kept(*bound.args, **bound.kwargs)

    return value


@shared
def gpt2(layers: int = 2, attention: str = "sdpa") -> Captured:
    return capture(models.gpt2(layers, attention=attention), tokens())


@shared
def bert(attention: str = "sdpa", layers: int = 2) -> Captured:
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(4, models.LENGTH, dtype=torch.long)}
    return capture(models.bert(layers, attention=attention), inputs)


@shared
def llama(attention: str = "sdpa", layers: int = 2) -> Captured:
    return capture(models.llama(layers, attention=attention), tokens())


@shared
def encoder() -> Captured:
    return capture(models.encoder(), vectors(3, 6, 16))


@shared
def resnet() -> Captured:
    return capture(models.resnet(), vectors(3, 1, 8, 8))


@shared
def mlp() -> Captured:
    return capture(models.mlp(), vectors(3, 8))


@shared
def convnet() -> Captured:
    return capture(models.convnet(), vectors(3, 1, 6, 6))


@shared
def functional() -> Captured:
    return capture(models.functional(), vectors(3, 8))


@shared
def token_mixer() -> Captured:
    return capture(models.token_mixer(), vectors(3, 6, 8))


@shared
def tabled() -> Captured:
    return capture(models.seeded(models.Tabled), tokens())


@shared
def fixed_length() -> Captured:
    return capture(models.FixedLength(models.token_mixer(), 6, 8), vectors(3, 6, 8))


@shared
def tied() -> Captured:
    return capture(models.seeded(models.Tied), vectors(3, 8))


def flow_of(captured: Captured) -> DataFlow:
    return data_flow(captured.graph_module.graph)


def recorded(captured: Captured, time: int = 11) -> dict[fx.Node, Any]:
    """Every node's value on random inputs, two of a batch."""
    sizes = {s: 2 if s.startswith("batch") else time for s in captured.signature.symbols}
    return record(captured.graph_module, captured.signature.random_inputs(sizes))


def traced(model: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    """A small graph of aten operators, before any pass."""
    module = torch.export.export(model.eval(), inputs, strict=False).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def vector_signature(width: int, name: str = "x") -> Signature:
    return Signature(inputs=(InputSpec(name=name, dtype=torch.float32, shape=("batch", width)),))
