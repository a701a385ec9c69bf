"""What is told of a conversion that is worse than nothing: the sentences, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch import nn

import thesean
from tests import captured
from tests.distill.tools import drafted
from tests.models import vectors
from thesean.distill.lost import _blamed, _worse, left_out
from thesean.errors import LostError
from thesean.passes.plan.hybrid import Hybrid


@pytest.mark.parametrize(
    ("own", "other", "worse"),
    [
        (1.0, 2.0, False), (1.0, 1.0, False), (1.009, 1.0, False), (1.011, 1.0, True),
        (0.0015, 0.001, False), (0.0021, 0.001, True),  # few rows tell no thousandth of a nat apart
    ],
)  # fmt: skip
def test_what_is_worse_is_so_by_a_hundredth_and_by_a_thousandth(own, other, worse):
    assert _worse(own, other) is worse


def blamed(parts: int, on_the_way: Mapping[str, float]) -> str:
    return _blamed(cast(Hybrid, type("Parts", (), {"parts": [None] * parts})()), on_the_way)


def test_the_part_that_added_most_is_to_blame_and_not_the_farthest():
    said = blamed(3, {"a": 0.5, "b": 2.5, "c": 3.0})
    assert said.startswith("It is b that did most of it: 0.5 before, 2.5 after. Keep it (keep='b'), or let max_drop")
    assert blamed(2, {"a": 2.0, "b": 3.0}).startswith("It is a that did most of it: 0 before, 2 after.")
    assert blamed(2, {"a": 2.0, "b": 9.0}).startswith("It is b that did most of it: 2 before, 9 after.")
    assert blamed(3, {"a": 2.0, "b": 9.0}) == "Train for longer, or choose another target."  # not all were measured


def test_parts_that_are_left_out_add_nothing_or_hand_on_what_they_get_and_come_back():
    guide = captured.gpt2()
    _, hybrid = drafted(guide, "rnn")
    before = {r.name: hybrid.module(r) for r in hybrid.replacements}
    ids = {"input_ids": torch.arange(12).reshape(2, 6) % 32}
    ran = hybrid.graph_module.eval()(**ids)["logits"]
    with left_out(hybrid) as paths:
        assert paths == list(hybrid.parts)
        for r in hybrid.replacements:
            module: Any = hybrid.module(r)
            x_BTD = vectors(2, 3, 4)
            y_BTD, state = module(x_BTD)
            assert state is None  # of a module that carries one
            assert torch.equal(y_BTD, torch.zeros_like(x_BTD) if r.join is not None else x_BTD)
        assert not torch.equal(hybrid.graph_module(**ids)["logits"], ran)
    assert {r.name: hybrid.module(r) for r in hybrid.replacements} == before
    assert torch.equal(hybrid.graph_module(**ids)["logits"], ran)


def test_what_changes_the_shape_can_not_be_left_out():
    _, hybrid = drafted(captured.mlp(), {"0..1": "mlp", "2..3": "identity", "4..5": "mlp"})
    shapes = [r.facts.input_shape == r.facts.output_shape for r in hybrid.replacements]
    families = [r.family for r in hybrid.replacements]
    wanted = [
        hybrid.parts[r.part]
        for r, same in zip(hybrid.replacements, shapes, strict=True)
        if same and r.family != "identity"
    ]
    with left_out(hybrid) as paths:
        assert paths == wanted
        kept = [r.name for r in hybrid.replacements if type(hybrid.module(r)).__name__ != "_LeftOut"]
    assert "identity" in families
    assert len(kept) == len(families) - len(wanted) > 0


@pytest.mark.parametrize(("rows", "told"), [(16, "a constant, the guide's mean output, is nearer"), (1, None)])
def test_numbers_farther_than_their_mean_are_lost_where_that_can_be_told(rows, told):
    """A replacement that nothing can be solved in, made for the numbers of other examples."""
    torch.manual_seed(0)
    guide = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    data = [vectors(rows, 8, seed=k) for k in range(4)]
    loud = thesean.Target("loud", build=lambda part: Loud(part.width_in, part.width_out))
    with pytest.raises(LostError, match=told) if told else nullcontext():
        thesean.compile(guide, loud, parts=["0"], data=data, recipe="fast", progress=False)


class Loud(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.out = nn.Linear(width_in, width_out)
        nn.init.normal_(self.out.weight, std=9.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)
