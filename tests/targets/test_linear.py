from __future__ import annotations

import json

import pytest
import torch

from tests.targets.build import build
from tests.targets.spatial_parts import map_part
from thesean.errors import TargetMismatchError
from thesean.targets import PartFacts, rebuild


def part_of(input_shape, output_shape, mixing="none", **facts) -> PartFacts:
    return PartFacts(
        path="layers.2", input_shape=input_shape, output_shape=output_shape, mixing=mixing, params=1, **facts
    )


TOKENS = part_of(("batch", "time", 6), ("batch", "time", 6), "causal")
VECTOR = part_of(("batch", 6), ("batch", 4))
FLATTENED = part_of(("batch", 3, 2, 2), ("batch", 5))


@pytest.mark.parametrize(
    ("part", "size", "weights"),
    [
        (TOKENS, (7, 6), 36),
        (VECTOR, (6,), 24),
        (FLATTENED, (3, 2, 2), 60),
        (map_part((3, 4, 4), (5, 2, 2)), (3, 4, 4), 15),
    ],
    ids=["tokens", "vector", "map to vector", "map"],
)
def test_one_matrix_that_is_affine_and_comes_back_from_its_config(part, size, weights):
    module = build("linear", part)
    assert module.last.weight.numel() == weights
    x, z = torch.randn(2, *size), torch.randn(2, *size)
    torch.testing.assert_close(module(2 * x - z), 2 * module(x) - module(z), rtol=1e-4, atol=1e-5)
    again = rebuild("linear", json.loads(json.dumps(module.config())))
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def test_the_input_is_added_unless_a_stream_runs_beside_the_part_or_shapes_differ():
    x = torch.randn(2, 7, 6)
    module = build("linear", TOKENS)
    torch.testing.assert_close(module(x), module.last(x) + x)
    branch = build("linear", part_of(("batch", "time", 6), ("batch", "time", 6), is_branch=True))
    torch.testing.assert_close(branch(x), branch.last(x))
    assert build("linear", VECTOR).skip(torch.randn(2, 6)) is None
    assert build("linear", TOKENS, residual=False).skip(x) is None


def test_pixels_are_averaged_to_the_outputs_resolution():
    module = build("linear", map_part((1, 4, 4), (1, 2, 2)))
    with torch.no_grad():
        module.last.weight.fill_(2)
        module.last.bias.fill_(1)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert module(x).flatten().tolist() == [6, 10, 22, 26]  # 1 + 2 * means of 2 x 2


def test_flops_are_two_per_weight_and_token_pixel_or_vector():
    assert build("linear", TOKENS).flops(TOKENS, {"batch": 2, "time": 5}) == 2 * 10 * 36
    assert build("linear", VECTOR).flops(VECTOR, {"batch": 3}) == 2 * 3 * 24
    part = map_part((3, 4, 4), (5, 2, 2))
    assert build("linear", part).flops(part, {"batch": 3}) == 2 * 3 * 4 * 15


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (part_of(("batch", "time", 6), ("batch", "half", 6)), "expected as many steps out as in"),
        (
            part_of(("batch", 3, "height", 4), ("batch", 5)),
            "expected a batch and at least one more dimension, all static",
        ),
        (part_of(("batch",), ("batch", 5)), r"found \(batch\) -> \(batch, 5\)\. Trace the guide with fixed sizes"),
    ],
)
def test_a_part_that_is_no_affine_map_of_fixed_size_is_refused(part, message):
    with pytest.raises(TargetMismatchError, match=rf"^layers\.2: target 'linear' .*{message}"):
        build("linear", part)
