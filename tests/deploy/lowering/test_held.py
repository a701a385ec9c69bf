"""The last tokens and those that were kept, in onnxruntime.

B batch, T time, D width
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch.export import Dim

from tests.deploy.lowering.test_lower import Flat, assert_same, export
from tests.targets.build import build, tensors
from thesean.deploy.lowering.forms.held import define
from thesean.targets import Affine, AttentionFacts, PartFacts
from thesean.targets.shared.rotation import Rotation

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

D = Dim.DYNAMIC
SIZES = [(2, 7), (1, 1), (3, 1), (1, 63), (2, 64), (1, 65), (2, 200)]


def some_attention(heads: int, width: int = 16) -> AttentionFacts:
    """One that turns queries and keys; two heads of queries share one of keys and values."""
    query, key, value, output = (Affine(torch.randn(width, width) / 4, torch.randn(width) / 10) for _ in range(4))
    twice = torch.tensor([*range(4), *range(4), *range(8, 12), *range(8, 12)])
    key, value = (Affine(a.weight_OI[twice], a.bias_O[twice]) for a in (key, value))
    facts = AttentionFacts(heads=heads, scale=0.2, query=query, key=key, value=value, output=output)
    return dataclasses.replace(facts, rotation=Rotation((0, 1), (2, 3), (1.0, 0.1)))


def from_start(flat: Flat, batch: int, time: int) -> tuple[torch.Tensor, ...]:
    x_BTD = torch.randn(batch, time, 16)
    return x_BTD, *tensors(flat.module.initial_state(x_BTD))


@pytest.fixture(
    params=[(5, 3), *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in ((1, 1), (40, 70)))],
    ids=str,
    scope="module",
)
def held(request) -> tuple[Flat, Any]:
    torch.manual_seed(0)
    window, kept = request.param
    shape = ("batch", "time", 16)
    facts = some_attention(4)
    part = PartFacts(path="layers.0", input_shape=shape, output_shape=shape, mixing="causal", params=1, attention=facts)
    module: Any = build("bounded-attention", part, window=window, kept=kept)
    module.copy_from(part)
    with torch.no_grad():
        module.score.weight.zero_()[:, :2].normal_(std=0.5)  # signs of two features: few scores
        module.lasting.fill_(0.5)  # some are worth so much that they stay
    flat = Flat(module.eval()).eval()
    model = ir.from_proto(export(flat, from_start(flat, 2, 7), ({0: D, 1: D}, ({0: D},) * flat.count), 20))
    define(model)
    return flat, ir.to_proto(model)


@pytest.mark.parametrize(("batch", "time"), SIZES)
def test_it_equals_torch_from_the_start_and_within_a_sequence(held, batch, time):
    flat, proto = held
    assert_same(proto, flat, from_start(flat, batch, time))
    with torch.no_grad():
        after = tensors(flat.module(torch.randn(batch, 50, 16))[1])
    assert_same(proto, flat, (torch.randn(batch, time, 16), *after))


def test_of_equal_scores_the_earlier_one_stays(held):
    """Also where a step follows a step: places are in the order in which their tokens came."""
    flat, proto = held
    x_BTD = torch.randn(1, 90, 16).sign()
    with torch.no_grad():
        after = tensors(flat.module(x_BTD)[1])
    assert_same(proto, flat, (x_BTD, *from_start(flat, 1, 90)[1:]))
    assert_same(proto, flat, (x_BTD[:, :1], *after))
