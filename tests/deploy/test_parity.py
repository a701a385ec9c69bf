"""What a file is compared at, with which inputs, and what counts as an error.

B batch, T time
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from tests import captured
from thesean.deploy.parity import (
    IN_TORCH,
    Check,
    CheckSizes,
    _shake,
    compare_all,
    compare_chunks,
    compare_whole,
    largest,
    not_comparable,
    refuses_negative,
    runnable,
    sizes_to_check,
    with_padding,
)
from thesean.errors import ExportError
from thesean.passes.graph.signature import Bound, InputSpec, Signature
from thesean.passes.thread_state import FAR

FLOAT, LONG = torch.float32, torch.int64


def signature(*specs: InputSpec, bounds: tuple[Bound, ...] = ()) -> Signature:
    return Signature(inputs=specs, bounds=bounds)


TIMED = signature(InputSpec(name="x", dtype=FLOAT, shape=("batch", "time", 3)))
ROWS = signature(InputSpec(name="x", dtype=FLOAT, shape=("batch", 3)))


class File:
    """As a session is called; what it computes is given."""

    def __init__(self, compute: Callable[..., Any], is_stateful: bool = False) -> None:
        self.compute, self.is_stateful = compute, is_stateful

    def run(self, inputs: dict[str, np.ndarray], state: Any = None) -> tuple[dict[str, np.ndarray], Any]:
        found = self.compute(**{n: torch.from_numpy(v) for n, v in inputs.items()})
        return {n: v.numpy() for n, v in found.items()}, {}


def network(compute: Callable[..., Any]) -> fx.GraphModule:
    """One whose graph is a call of `compute`."""

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return compute(x)

    return fx.symbolic_trace(Network())


def test_sizes_are_of_several_rows_and_lengths_and_of_a_long_one():
    assert [s.shape for s in sizes_to_check(TIMED, 64)] == [(2, 7), (2, 19), (5, 3), (1, 1), (1, 64)]
    assert [s.shape for s in sizes_to_check(TIMED, None)] == [(2, 7), (2, 19), (5, 3), (1, 1)]
    assert [s.shape for s in sizes_to_check(ROWS, 64)] == [(1,), (2,), (5,)]
    fixed = signature(InputSpec(name="x", dtype=FLOAT, shape=(2, 3)))
    assert [s.shape for s in sizes_to_check(fixed, None)] == [(1,)]


def test_sizes_are_the_nearest_ones_that_the_network_is_right_for_each_once():
    spec = InputSpec(name="x", dtype=FLOAT, shape=("batch", "time"))
    bounded = signature(spec, bounds=(Bound(name="time", least=5, most=8), Bound(name="batch", least=2)))
    assert [s.shape for s in sizes_to_check(bounded, 64)] == [(2, 7), (2, 8), (5, 5), (2, 5)]
    assert CheckSizes(batch=1, length=None).within(bounded).shape == (2,)
    assert CheckSizes(batch=9, length=9).within(TIMED) == CheckSizes(batch=9, length=9)
    assert CheckSizes(batch=9, length=None).of(TIMED) == {"batch": 9, "time": 1}


def test_a_module_runs_where_it_raises_nothing_and_is_right():
    narrow = network(lambda x: x[:, 2].unsqueeze(1))
    assert runnable(narrow, TIMED, CheckSizes(batch=1, length=3))
    assert not runnable(narrow, TIMED, CheckSizes(batch=1, length=2))
    bounded = signature(*TIMED.inputs, bounds=(Bound(name="time", least=5),))
    assert not runnable(narrow, bounded, CheckSizes(batch=1, length=4))
    assert runnable(narrow, bounded, CheckSizes(batch=1, length=5))


def test_the_worst_output_counts_and_what_has_no_number_is_named():
    nan = math.nan
    assert Check.of("l", (1,), ("a", "b"), (0.25, 0.5)) == Check("l", (1,), 0.5, ())
    assert Check.of("l", (1,), ("a", "b", "c"), (0.25, nan, nan)) == Check("l", (1,), 0.25, ("b", "c"))
    only = Check.of("l", (2, 7), ("a",), (nan,))
    assert math.isnan(only.max_abs_error)
    assert largest([only]) == "nothing could be compared"
    assert largest([only, Check("n", (1, 1), 2e-6), Check("m", (5, 3), 3e-6)]) == "largest error 3.0e-06 (m at (5, 3))"
    assert not_comparable([Check("m", (1, 1), 2e-6)]) == ""
    assert not_comparable([Check("m", (1, 1), 2e-6), only]).startswith("l at (2, 7): expected finite numbers")
    assert not_comparable([]).startswith("the torch module runs at none of the sizes")


def test_a_file_is_held_against_the_module_output_by_output():
    module = network(lambda x: (2 * x, x + 1))
    names, sizes = ("double", "more"), CheckSizes(batch=2, length=7)
    same = compare_whole(File(lambda x: {"more": x + 1, "double": 2 * x}), module, TIMED, sizes, names)
    assert same == Check("onnxruntime vs torch", (2, 7), 0.0, ())
    off = compare_whole(File(lambda x: {"double": 2 * x, "more": x + 1.5}), module, TIMED, sizes, names)
    assert off is not None
    assert 0.05 < off.max_abs_error <= 0.5
    narrow = network(lambda x: x[:, 7:8] + x)
    assert compare_whole(File(lambda x: {"y": x}), narrow, TIMED, sizes, ("y",)) is None


def test_all_sizes_are_compared_up_to_four_times_the_length_of_training_and_what_does_not_run_is_told():
    module = network(lambda x: x[:, 2].unsqueeze(1) + x)
    file = File(lambda x: {"y": x[:, 2].unsqueeze(1) + x})
    checks, skipped = compare_all(file, None, module, TIMED, ("y",), 20)
    assert [c.shape for c in checks] == [(2, 7), (2, 19), (5, 3), (1, 80)]
    assert max(c.max_abs_error for c in checks) == 0
    assert skipped == ["not checked at (1, 1): the torch module doesn't run there either"]


def test_a_table_of_positions_bounds_the_longest():
    guide = captured.tabled()  # of 64

    def file(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"y": guide.graph_module(input_ids=input_ids)}

    for train_length, longest in ((10, 40), (30, 64)):
        checks, skipped = compare_all(File(file), None, guide.graph_module, guide.signature, ("y",), train_length)
        assert checks[-1].shape == (1, longest)
        assert skipped == []


MASK = InputSpec(name="mask", dtype=LONG, shape=("batch", "time"))
X = InputSpec(name="x", dtype=FLOAT, shape=("batch", "time"))
IDS = InputSpec(name="ids", dtype=LONG, shape=("batch", "time"), high=9)


def masked(spec: InputSpec, time: int = 7) -> tuple[torch.Tensor, np.ndarray | None]:
    value = torch.ones(2, time, dtype=spec.dtype)
    inputs, shown = with_padding(signature(spec), {spec.name: value})
    return inputs[spec.name], shown


def test_the_end_of_the_first_row_is_padding_a_third_of_it():
    found, shown = masked(MASK)
    assert found.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert shown is not None
    assert shown.tolist() == found.bool().tolist()
    assert masked(MASK, 3)[0].tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    "spec",
    [
        IDS,
        X,
        InputSpec(name="m", dtype=LONG, shape=("batch", "time"), held=True),
        InputSpec(name="m", dtype=LONG, shape=("batch", "time"), example=torch.tensor([[3, 1]])),
    ],
    ids=["ids", "numbers", "held", "counts"],
)
def test_what_is_no_mask_of_steps_is_left_as_it_was(spec):
    found, shown = masked(spec)
    assert shown is None
    assert bool((found == 1).all())


def test_two_steps_are_too_few_for_padding_and_a_mask_of_floats_is_known_by_its_name():
    assert masked(MASK, 2)[1] is None
    floats = InputSpec(name="m", dtype=FLOAT, shape=("batch", "time"), mask=True, example=torch.ones(1, 4))
    assert masked(floats)[0][0].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_where_two_masks_are_of_one_shape_what_both_show_counts():
    other = InputSpec(name="other", dtype=LONG, shape=("batch", "time"))
    values = {"mask": torch.ones(2, 7, dtype=LONG), "other": torch.ones(2, 7, dtype=LONG)}
    values["mask"][1, 3] = 0  # one mask hides a step of its own
    _, shown = with_padding(signature(MASK, other), values)
    assert shown is not None
    assert shown.tolist() == [[True] * 5 + [False] * 2, [True] * 3 + [False] + [True] * 3]


@pytest.mark.parametrize(("stateful", "compared"), [(True, False), (False, True)])
def test_a_file_with_state_is_not_compared_where_nothing_is_seen(stateful, compared):
    class Network(nn.Module):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return 2.0 * mask

    file = File(lambda mask: {"y": torch.where(mask == 0, 9.0, 2.0 * mask)}, is_stateful=stateful)
    sizes = CheckSizes(batch=2, length=7)
    check = compare_whole(file, fx.symbolic_trace(Network()), signature(MASK), sizes, ("y",))
    assert check is not None
    assert (check.max_abs_error > 0) == compared


def test_torch_refuses_ids_below_the_first_row_unless_the_network_takes_them_for_others():
    ids = signature(IDS)

    class Clamped(nn.Module):
        def __init__(self, least: int) -> None:
            super().__init__()
            self.table, self.least = nn.Embedding(9, 2), least

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids.clamp_min(self.least))

    assert refuses_negative(fx.symbolic_trace(Clamped(-9)), ids, "ids")
    assert not refuses_negative(fx.symbolic_trace(Clamped(0)), ids, "ids")
    assert not refuses_negative(fx.symbolic_trace(Clamped(20)), ids, "ids")  # nothing is known


def running_sum() -> tuple[fx.GraphModule, fx.GraphModule]:
    """A network, and the same with the sum so far as its state."""

    class Threaded(nn.Module):
        def forward(self, x: torch.Tensor, state_in_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x.cumsum(1) + state_in_sum.unsqueeze(1)
            return y, y[:, -1]

    threaded = fx.symbolic_trace(Threaded())
    threaded.meta["states"] = (InputSpec(name="state_in_sum", dtype=FLOAT, shape=("batch", 3)),)
    return network(lambda x: x.cumsum(1)), threaded


class Summing(File):
    """A file that carries the sum; `wrong` changes what it gives in a later chunk."""

    def __init__(self, wrong: Callable[[np.ndarray], np.ndarray] = lambda y: y) -> None:
        super().__init__(lambda: None, is_stateful=True)
        self.wrong = wrong

    def run(self, inputs: dict[str, np.ndarray], state: Any = None) -> tuple[dict[str, np.ndarray], Any]:
        y = inputs["x"].cumsum(1) + (0.0 if state is None else state[:, None])
        return {"y": y if state is None else self.wrong(y)}, y[:, -1]


@pytest.mark.parametrize(
    ("far", "longest", "shapes"),
    [(10, None, [(3, 20)]), (20, None, [(3, 20)]), (21, None, [(3, 20), (1, 21)]), (40, 12, [(3, 12), (1, 40)])],
)
def test_chunks_are_compared_with_the_whole_and_again_past_what_positions_are_compared_with(far, longest, shapes):
    module, threaded = running_sum()
    threaded.meta[FAR] = far
    checks = compare_chunks(Summing(), threaded, module, TIMED, ("y",), longest)
    labels = ("chunks in onnxruntime vs whole", IN_TORCH)
    assert [(c.label, c.shape) for c in checks] == [(label, shape) for shape in shapes for label in labels]
    assert max(c.max_abs_error for c in checks) < 1e-5


def test_far_is_no_further_than_the_network_goes():
    module, threaded = running_sum()
    threaded.meta[FAR] = 40
    bounded = signature(*TIMED.inputs, bounds=(Bound(name="time", most=30),))
    checks = compare_chunks(Summing(), threaded, module, bounded, ("y",), None)
    assert {c.shape for c in checks} == {(3, 20), (1, 30)}


@pytest.mark.parametrize(
    ("wrong", "at_least"), [(lambda y: y + 0.5, 0.01), (lambda y: np.concatenate([y, y], 1), math.inf)]
)
def test_a_file_whose_chunks_are_others_is_found_and_torch_is_not_blamed(wrong, at_least):
    module, threaded = running_sum()
    threaded.meta[FAR] = 0
    in_file, in_torch = compare_chunks(Summing(wrong), threaded, module, TIMED, ("y",), None)
    assert in_file.max_abs_error >= at_least
    assert in_torch.max_abs_error < 1e-5


def test_a_module_that_does_not_run_where_chunks_are_compared_is_told():
    _, threaded = running_sum()
    threaded.meta[FAR] = 0
    long = network(lambda x: x[:, 30].unsqueeze(1) + x)
    with pytest.raises(ExportError, match=r"the torch module doesn't run at \(3, 20\), where chunks are compared"):
        compare_chunks(Summing(), threaded, long, TIMED, ("y",), None)


def test_weights_are_shaken_by_a_seed_of_their_own_and_stilled_again():
    module = copy.deepcopy(captured.mlp().graph_module)
    before = {k: v.clone() for k, v in module.named_parameters()}
    shaken: list[dict[str, torch.Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(shaken))
        _shake(module, seed)
        shaken.append({k: v.clone() for k, v in module.named_parameters()})
        _shake(module, seed, back=True)
        for name, weight in module.named_parameters():
            torch.testing.assert_close(weight, before[name], rtol=1e-6, atol=0)
    first, again, other = shaken
    assert all(torch.allclose(first[k], again[k], rtol=1e-7, atol=0) for k in before)
    assert any(not torch.allclose(first[k], other[k], rtol=1e-7, atol=0) for k in before)
