"""Rotations that are drawn, read back as numbers from what they do to queries; and maps that are none.

B batch, T time, H heads, C width of a head
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.models import vectors
from tests.written import ends, written
from thesean.passes.analyse.rotation import as_written, find_rotation
from thesean.passes.analyse.scores import Operand
from thesean.passes.graph.record import record
from thesean.targets.shared.rotation import Rotation

aten = torch.ops.aten
BATCH, TIME, HEADS, WIDTH = 2, 9, 3, 8

Map = Callable[[torch.Tensor], torch.Tensor]  # of (T,) steps to (T, C, C)


def maps_of(rotation: Rotation, scale: float) -> Map:
    def maps(step_T: torch.Tensor) -> torch.Tensor:
        found = torch.eye(WIDTH, dtype=torch.float64).repeat(len(step_T), 1, 1)
        for a, b, angle in zip(*rotation, strict=True):
            cos, sin = (step_T * angle).cos(), (step_T * angle).sin()
            found[:, a, a], found[:, a, b], found[:, b, a], found[:, b, b] = cos, -sin, sin, cos
        return scale * found

    return maps


def found_in(maps_TCC: torch.Tensor, groups: int = HEADS, heads_first: bool = True, changed: Any = None) -> Any:
    """What is read where each step's features go through a map of their own."""
    x = vectors(BATCH, groups, TIME, WIDTH) if heads_first else vectors(BATCH, TIME, groups, WIDTH)

    def made(c: Any, x: Any, maps: Any) -> Any:
        by_head = x if heads_first else c(aten.transpose.int, x, 1, 2)
        turned = c(aten.squeeze.dim, c(aten.matmul.default, maps, c(aten.unsqueeze.default, by_head, -1)), -1)
        if changed is not None:
            turned = changed(c, turned)
        return c(aten.repeat_interleave.self_int, turned, HEADS // groups, 1) if groups < HEADS else turned

    graph_module = written(made, x, maps=maps_TCC.float())
    (source,) = graph_module.graph.find_nodes(op="placeholder")
    run = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    return find_rotation(record(graph_module, {"x_0": x}), run, source, Operand(ends(graph_module)))


def drawn(seed: int) -> tuple[Rotation, float]:
    generator = random.Random(seed)
    features = generator.sample(range(WIDTH), WIDTH)
    pairs = sorted(tuple(sorted(features[2 * k : 2 * k + 2])) for k in range(generator.randint(1, WIDTH // 2)))
    angles = tuple(generator.choice([-1, 1]) * math.exp(generator.uniform(-6, 1.1)) for _ in pairs)
    first, second = zip(*pairs, strict=True)
    return Rotation(first, second, angles), generator.choice([-1, 1]) * math.exp(generator.uniform(-3, 3))


STEP_T = torch.arange(TIME, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(16))
def test_a_rotation_is_read_back_whatever_its_pairs_angles_scale_and_layout(seed):
    rotation, scale = drawn(seed)
    found = found_in(maps_of(rotation, scale)(STEP_T), groups=(1, HEADS)[seed % 2], heads_first=seed % 4 < 2)
    assert found is not None
    read, gain = found
    assert gain == pytest.approx(abs(scale), rel=1e-5)  # a sign is turned by half a turn, or both sides have it
    assert read is not None
    assert read[:2] == rotation[:2]
    assert read.angle == pytest.approx(rotation.angle, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("first", [3, -2])
def test_counting_may_begin_anywhere(first):
    rotation, _ = drawn(1)
    found = found_in(maps_of(rotation, 1.0)(STEP_T + first))
    assert found is not None
    assert found[0] is not None
    assert found[0][:2] == rotation[:2]
    assert found[0].angle == pytest.approx(rotation.angle, rel=1e-4, abs=1e-6)


def test_what_turns_nothing_has_a_scale_alone():
    for scale in (0.25, 3.0):
        found = found_in(torch.eye(WIDTH).expand(TIME, -1, -1) * scale)
        assert found is not None
        assert found == (None, pytest.approx(scale))


EYE_TCC = torch.eye(WIDTH, dtype=torch.float64).repeat(TIME, 1, 1)
ROTATION_TCC = maps_of(Rotation((0, 2), (1, 5), (0.3, 1.1)), 1.0)(STEP_T)


def with_entry(maps_TCC: torch.Tensor, t: int, row: int, column: int, value: float) -> torch.Tensor:
    maps_TCC = maps_TCC.clone()
    maps_TCC[t, row, column] += value
    return maps_TCC


NONE: dict[str, torch.Tensor] = {
    "nothing": 0 * EYE_TCC,
    "by the square of the step": maps_of(Rotation((0,), (1,), (0.05,)), 1.0)(STEP_T.square()),
    "a scale that grows": EYE_TCC * (1 + 0.01 * STEP_T).view(-1, 1, 1),
    "turned and grown": ROTATION_TCC * (1 + 0.01 * STEP_T).view(-1, 1, 1),
    "one more entry at a late step": with_entry(ROTATION_TCC, 7, 3, 4, 1e-3),
    "a feature in two pairs": maps_of(Rotation((0,), (1,), (0.3,)), 1.0)(STEP_T)
    @ maps_of(Rotation((1,), (2,), (0.3,)), 1.0)(STEP_T),
    "a mirror": torch.cat([EYE_TCC[:1], -EYE_TCC[1:]]),
    "a shear": EYE_TCC + STEP_T.view(-1, 1, 1) * torch.eye(WIDTH, dtype=torch.float64).roll(1, 1),
    "an ellipse": ROTATION_TCC * torch.tensor([[1.0, 1.2] * 4], dtype=torch.float64),
}


@pytest.mark.parametrize("name", NONE)
def test_another_map_is_no_rotation(name):
    assert found_in(NONE[name]) is None


def test_what_is_not_linear_or_not_the_same_for_all_heads_is_none():
    others = {
        "a shift": lambda c, x: c(aten.add.Tensor, x, 0.5),
        "a bend": lambda c, x: c(aten.tanh.default, x),
        "a size": lambda c, x: c(aten.abs.default, x),
        "by head": lambda c, x: c(aten.cumsum.default, x, 1),
        "by row": lambda c, x: c(aten.cumsum.default, x, 0),
        "fewer features": lambda c, x: c(aten.slice.Tensor, x, 3, 0, 4),
        "fewer steps": lambda c, x: c(aten.slice.Tensor, x, 2, 0, 4),
        "the step before": lambda c, x: c(aten.roll.default, x, [1], [2]),
    }
    assert {name: found_in(ROTATION_TCC, changed=changed) for name, changed in others.items()} == dict.fromkeys(others)
    assert found_in(ROTATION_TCC, changed=lambda c, x: c(aten.mul.Tensor, x, 1.0)) is not None


def test_angles_are_taken_from_the_table_that_says_the_same():
    rotation = Rotation((0, 1, 2), (3, 4, 5), (0.1, -0.01, 1.0))
    exact = torch.tensor([1.00001, 0.1000001, 0.01], dtype=torch.float64)
    want = (0.1000001, -0.01, 1.00001)
    for tables in ([exact], [exact.flip(0)], [torch.ones(3), exact.view(3, 1)], [exact, 1.01 * exact]):
        assert as_written(rotation, tables).angle == want
    for tables in ([], [exact[:2]], [1.01 * exact], [torch.tensor([1, 0, 0])], [-exact], [exact.new_zeros(4)]):
        assert as_written(rotation, tables) == rotation
