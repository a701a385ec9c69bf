"""The last tokens and those that were kept, in onnxruntime.

B batch, T time, D width
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.export import Dim

from tests.deploy.lowering.test_lower import Flat, export, run
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
    params=[(5, 3), *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in ((1, 1), (40, 70), (70, 4)))],
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


def in_order(state: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """By when tokens came, those that were kept by their score: a step of the file moves none. What a place without one
    scores means nothing.
    """
    keys_BGNC, values_BGNK, marks_BG2N, *rest = state
    marks_BG2N = np.where(marks_BG2N[:, :, :1] > 0, marks_BG2N, 0)
    order_BGN = np.lexsort((marks_BG2N[:, :, 1], marks_BG2N[:, :, 0]))
    rows = (np.take_along_axis(x, order_BGN[..., None], 2) for x in (keys_BGNC, values_BGNK))
    return *rows, np.take_along_axis(marks_BG2N, order_BGN[:, :, None], 3), *rest


def assert_same(proto: Any, flat: Flat, inputs: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        y_BTD, *expected = (tensor.numpy() for tensor in flat(*inputs))
    found_BTD, *found = run(proto, inputs)
    np.testing.assert_allclose(found_BTD, y_BTD, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(in_order(tuple(found)), in_order(tuple(expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "time"), SIZES)
def test_it_equals_torch_from_the_start_and_within_a_sequence(held, batch, time):
    flat, proto = held
    assert_same(proto, flat, from_start(flat, batch, time))
    with torch.no_grad():
        after = tensors(flat.module(torch.randn(batch, 50, 16))[1])
    assert_same(proto, flat, (torch.randn(batch, time, 16), *after))


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("equals", [False, True], ids=["all scores differ", "few scores"])
def test_a_text_that_is_about_as_long_as_what_is_held(held, more, equals):
    """Where no token goes there are no blocks; in the step that takes the last place those that were kept fade."""
    flat, proto = held
    x_BTD, *empty = from_start(flat, 3, flat.module.window + flat.module.places + more)
    if equals:
        x_BTD[..., :2] = x_BTD[..., :2].sign()
    assert_same(proto, flat, (x_BTD, *empty))
    after = tuple(torch.from_numpy(x) for x in run(proto, (x_BTD, *empty))[1:])
    assert_same(proto, flat, (torch.randn(3, 9, 16), *after))


def test_one_row_that_was_held_before_is_not_forgotten(held):
    flat, proto = held
    with torch.no_grad():
        after = tensors(flat.module(torch.randn(2, 4, 16))[1])
    for tensor in after:
        tensor[0] = 0
    assert_same(proto, flat, (torch.randn(2, 3, 16), *after))


def streamed(proto: Any, flat: Flat, x_BTD: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Chunk after chunk, each from the state that the file left."""
    state, outputs = from_start(flat, *x_BTD.shape[:2])[1:], []
    for chunk_BTD in x_BTD.split(chunks, 1):
        y_BTD, *left = map(torch.from_numpy, run(proto, (chunk_BTD, *state)))
        state = tuple(left)
        outputs.append(y_BTD)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("chunks", [[1] * 130, [20, *[1] * 90, 20], [*[1] * 50, 30, *[1] * 49, 1]], ids=len)
@pytest.mark.parametrize("equals", [False, True], ids=["all scores differ", "few scores"])
def test_steps_and_chunks_equal_the_whole(held, chunks, equals):
    """Whoever of equals stays: a step writes where another token stood, and chunks put all in order."""
    flat, proto = held
    x_BTD = torch.randn(3, 130, 16)
    if equals:
        x_BTD[..., :2] = x_BTD[..., :2].sign()
    with torch.no_grad():
        whole_BTD = flat(x_BTD, *from_start(flat, 3, 130)[1:])[0]
    torch.testing.assert_close(streamed(proto, flat, x_BTD, chunks), whole_BTD, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_begin_anew_alone(held):
    flat, proto = held
    x_BTD = torch.randn(2, 60, 16)
    _, *state = map(torch.from_numpy, run(proto, (x_BTD, *from_start(flat, 2, 60)[1:])))
    for tensor in state:
        tensor[1] = 0
    y_BTD, *_ = map(torch.from_numpy, run(proto, (x_BTD[:, :1], *state)))
    alone_BTD = streamed(proto, flat, x_BTD[1:, :1], [1])
    torch.testing.assert_close(y_BTD[1:], alone_BTD, rtol=1e-5, atol=1e-6)


def test_layers_that_are_alike_choose_together():
    """And those whose state is not there yet by themselves."""
    model = ir.from_onnx_text(_TWO_LAYERS)
    define(model)
    names = [node.op_type for node in model.graph]
    assert [name for name in names if name.startswith("WhoStays")] == [
        "WhoStays_G2_C4_K4_W5_M4_F8_L2",
        "WhoStays_G2_C4_K4_W5_M4_F8_L1",
    ]
    calls = [node for node in model.graph if node.op_type.startswith("Held_")]
    assert [len(call.inputs) for call in calls] == [12, 12, 12]
    first, second, third = ([value.producer() for value in call.inputs[7:11]] for call in calls)
    assert {*first} == {*second}
    assert {*third} != {*first}
    assert calls[1].inputs[7].name.endswith("slot_1")


_CALL = "thesean.Held_H4_G2_C4_K4_W5_M4_F8 <scale = 0.5>"
_TWO_LAYERS = f"""
<ir_version: 9, opset_import: ["" : 20, "thesean" : 1]>
held (float[B, T, 4, 4] query, float[B, T, 2, 4] key, float[B, T, 2] score, float[B, 2, 9, 4] keys_0,
      float[B, 2, 9, 4] keys_1, float[B, 2, 2, 9] marks_0, float[B, 2, 2, 9] marks_1)
    => (float[B, T, 16] y)
{{
    mean_0, k0, v0, m0 = {_CALL} (query, key, key, score, keys_0, keys_0, marks_0)
    mean_1, k1, v1, m1 = {_CALL} (query, key, key, score, keys_1, keys_1, marks_1)
    mean_2, k2, v2, m2 = {_CALL} (query, key, key, score, k1, v1, m1)
    sum_01 = Add (mean_0, mean_1)
    y = Add (sum_01, mean_2)
}}
"""
