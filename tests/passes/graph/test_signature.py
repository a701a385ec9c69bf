"""What a network is called with: arguments by name, sizes within bounds, ids within tables, and inputs made up.

B batch, T time
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from thesean.errors import DataError
from thesean.passes.graph.signature import Bound, InputSpec, Signature, fits_record, output_wrapper

IDS = InputSpec(name="ids", dtype=torch.int64, shape=("batch", "time"), high=10)
X = InputSpec(name="x", dtype=torch.float32, shape=("batch", "time", 3))
BOTH = Signature(inputs=(IDS, X))


def ids_BT(batch: int = 2, time: int = 5) -> torch.Tensor:
    return torch.zeros(batch, time, dtype=torch.int64)


def x_BT3(batch: int = 2, time: int = 5) -> torch.Tensor:
    return torch.zeros(batch, time, 3)


def test_arguments_are_bound_in_order_and_by_name():
    for args, named in (
        ((ids_BT(), x_BT3()), {}),
        ((ids_BT(),), {"x": x_BT3()}),
        ((), {"x": x_BT3(), "ids": ids_BT()}),
    ):
        bound = BOTH.bind(args, named)
        assert list(bound) == ["ids", "x"]
        assert bound["x"].shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("args", "named", "told"),
    [
        ((ids_BT(), x_BT3(), 1), {}, r"expected at most 2 inputs \(ids, x\), found 3"),
        ((ids_BT(),), {"y": x_BT3()}, "unknown input 'y'; the converted model takes: ids, x"),
        ((ids_BT(),), {"ids": ids_BT()}, "input 'ids' is given twice"),
        ((ids_BT(),), {}, "missing input 'x'"),
        (([1], x_BT3()), {}, "ids: expected a tensor, found list"),
        ((ids_BT().int(), x_BT3()), {}, "expected torch.int64, found torch.int32"),
        ((ids_BT().to_sparse(), x_BT3()), {}, "expected a dense tensor, found one of torch.sparse_coo"),
        ((ids_BT(), x_BT3()[0]), {}, r"expected x: float32\[batch, time, 3\], found shape \(5, 3\)"),
        ((ids_BT(), x_BT3(time=4)), {}, r"found shape \(2, 4, 3\) \(time=5\)"),
        ((ids_BT(), x_BT3()[..., :2]), {}, r"found shape \(2, 5, 2\): dimension 2 was captured at 3 alone. .* of 2"),
    ],
)
def test_what_does_not_fit_is_named(args: tuple[Any, ...], named: dict[str, Any], told: str):
    with pytest.raises(DataError, match=told):
        BOTH.bind(args, named)


def test_sizes_out_of_bounds_are_told_and_brought_within():
    bounds = (Bound(name="time", least=2, most=4), Bound(name="batch", least=3), Bound(name="other", most=1))
    signature = Signature(inputs=(IDS,), bounds=bounds)
    assert [b.describe() for b in bounds] == ["2 to 4", "3 or more", "1 alone"]
    assert [bounds[0].holds(n) for n in (1, 2, 4, 5)] == [False, True, True, False]
    assert bounds[1].holds(10**9)
    assert signature.check({"ids": ids_BT(3, 4)}) == {"batch": 3, "time": 4}
    for batch, time, told in ((3, 5, "time: expected 2 to 4, found 5"), (2, 3, "batch: expected 3 or more, found 2")):
        with pytest.raises(DataError, match=told):
            signature.check({"ids": ids_BT(batch, time)})
    assert signature.within({"batch": 1, "time": 9, "free": 7}) == {"batch": 3, "time": 4, "free": 7}
    assert signature.within({"batch": 8, "time": 1}) == {"batch": 8, "time": 2}
    assert signature.fits({"batch": 8, "time": 3})
    assert not signature.fits({"batch": 8, "time": 5})


def test_ids_that_no_table_holds_are_told():
    assert BOTH.out_of_range({"ids": ids_BT() + 9, "x": x_BT3()}) == ""
    assert BOTH.out_of_range({"ids": ids_BT() + 10, "x": x_BT3()}) == "ids holds 10; expected ids from 0 to 9"
    assert BOTH.out_of_range({"ids": ids_BT() - 1, "x": x_BT3()}) == "ids holds -1; expected ids from 0 to 9"
    assert BOTH.out_of_range({"ids": ids_BT(0), "x": x_BT3(0)}) == ""


def test_the_first_rows_of_a_batch_are_those_of_each_input_that_has_one():
    positions = InputSpec(name="at", dtype=torch.int64, shape=("time",))
    signature = Signature(inputs=(IDS, positions))
    few = signature.first_rows({"ids": ids_BT(4), "at": torch.arange(5)}, 3)
    assert (few["ids"].shape, few["at"].shape) == ((3, 5), (5,))
    assert signature.first_rows(few, 9)["ids"].shape == (3, 5)


def test_inputs_without_an_example_are_made_up_by_their_dtype():
    signature = Signature(
        inputs=(
            IDS,
            X,
            InputSpec(name="shown", dtype=torch.bool, shape=("batch", "time")),
            InputSpec(name="mask", dtype=torch.int64, shape=("batch", "time")),
            InputSpec(name="late", dtype=torch.int64, shape=("batch", 40), high=10, low=7),
            InputSpec(name="one", dtype=torch.int64, shape=("batch",), high=1, low=7),
        )
    )
    made = signature.random_inputs({"batch": 3, "time": 50})
    assert {k: (v.dtype, tuple(v.shape)) for k, v in made.items()} == {
        s.name: (s.dtype, tuple({"batch": 3, "time": 50}.get(str(d), d) for d in s.shape)) for s in signature.inputs
    }
    assert set(made["ids"].flatten().tolist()) == set(range(10))
    assert set(made["late"].flatten().tolist()) == {7, 8, 9}
    assert set(made["one"].tolist()) == {0}
    assert bool(made["shown"].all())
    assert bool((made["mask"] == 1).all())
    assert 0.8 < made["x"].std() < 1.2
    again, other = (
        signature.random_inputs({"batch": 3, "time": 50}),
        signature.random_inputs({"batch": 3, "time": 50}, 1),
    )
    assert torch.equal(made["x"], again["x"])
    assert not torch.equal(made["x"], other["x"])


def test_inputs_are_made_of_their_example_and_masks_of_floats_hide_nothing():
    example = torch.randn(4, 6, 3)
    hides = torch.tensor([[1.0, 1.0, 0.0]])
    signature = Signature(
        inputs=(
            InputSpec(name="x", dtype=torch.float32, shape=("batch", "time", 3), example=example),
            InputSpec(name="mask", dtype=torch.float32, shape=("batch", 2), mask=True, example=hides),
            InputSpec(name="untold", dtype=torch.float32, shape=("batch", 2), mask=True),
        )
    )
    made = signature.random_inputs({"batch": 5, "time": 7})
    rows = {tuple(row) for row in example.flatten(0, 1).tolist()}
    assert {tuple(row) for row in made["x"].flatten(0, 1).tolist()} <= rows
    assert torch.equal(made["mask"], torch.ones(5, 2))
    assert made["untold"].std() > 0  # nothing is known of what it says
    in_order = signature.random_inputs({"batch": 1, "time": 6}, in_order=True)["x"]
    assert torch.equal(in_order, example[:1])
    assert signature.example_sizes == {"batch": 4, "time": 6}


def test_an_output_class_is_filled_with_a_dicts_values_and_nothing_else():
    path = "transformers.modeling_outputs.BaseModelOutput"
    signature = Signature(inputs=(X,), output_class=path)
    wrap = output_wrapper(signature)
    assert type(wrap({"last_hidden_state": x_BT3()})).__name__ == "BaseModelOutput"
    assert torch.equal(wrap(x_BT3()), x_BT3())
    assert output_wrapper(BOTH)({"a": 1}) == {"a": 1}
    assert fits_record(signature, {"last_hidden_state": x_BT3()})
    assert fits_record(signature, x_BT3())
    assert not fits_record(signature, {"logits": x_BT3()})
    assert fits_record(BOTH, {"logits": x_BT3()})


def test_what_is_held_has_no_dimension_that_a_caller_chooses():
    held = InputSpec(name="encoded", dtype=torch.float32, shape=("batch", "source", 8), held=True)
    ids = InputSpec(name="ids", dtype=torch.int64, shape=("batch", "time"))
    assert Signature(inputs=(held, ids)).symbols == ("batch", "time")


def test_what_a_class_that_is_not_at_hand_held_is_there_by_name_and_as_attributes():
    wrap = output_wrapper(Signature(inputs=(X,), output_class="somewhere.Boxes"))
    made = wrap({"boxes": torch.ones(2), "scores": torch.zeros(2)})
    assert made.boxes is made["boxes"]
    with pytest.raises(AttributeError, match="the output has no 'labels': it holds boxes, scores"):
        _ = made.labels
    halved = pytree.tree_map(lambda value: value / 2, made)
    assert type(halved) is type(made)
    assert torch.equal(halved.boxes, torch.full((2,), 0.5))
    plain = {"boxes": torch.ones(2)}
    assert output_wrapper(Signature(inputs=(X,)))(plain) is plain
