"""Sums over all steps so far, as state."""

from __future__ import annotations

import pytest
import torch

from tests import captured, models
from tests.causal_guides import family
from tests.looking_back import FOLDS, SUMS, WIDTH, looking_back
from tests.passes.contract import Example
from tests.passes.test_cache_steps import assert_chunks_equal_whole
from thesean.passes.carry_sums import CarrySums
from thesean.passes.graph.running_fold import RunningFold
from thesean.passes.graph.running_sum import RunningSum
from thesean.passes.graph.text import text
from thesean.passes.thread_state import ThreadState


def test_the_graph_before_and_after():
    guide = looking_back("averaged")
    before = text(guide.graph_module.graph)
    after = text(CarrySums(guide.signature)(guide.graph_module).graph_module.graph)
    assert text(guide.graph_module.graph) == before
    at = before.index("cumsum_1 = aten.cumsum.default(tanh, 1)")
    rest = [line.replace("cumsum_1", "getitem_1") for line in before[at + 1 :]]
    assert after[-len(rest) - 3 :] == [before[at - 1], "sum_1 = sum_1(tanh)", "getitem_1 = getitem(sum_1, 0)", *rest]


@pytest.mark.parametrize("spelling", [*SUMS, *FOLDS])
def test_chunks_equal_the_whole_however_it_is_written(spelling):
    guide = looking_back(spelling)
    stateful = ThreadState(guide.signature)(CarrySums(guide.signature)(guide.graph_module).graph_module).graph_module
    assert stateful.meta["rows_are_alone"]
    assert_chunks_equal_whole(stateful, guide, {"x": models.vectors(2, 12, WIDTH)})


def test_what_counts_visible_steps_is_no_sum_of_hidden_states():
    guide = family("opt", masked=True)  # its positions are a running sum of the mask
    cumsum = torch.ops.aten.cumsum.default
    assert guide.graph_module.graph.find_nodes(op="call_function", target=cumsum)
    assert CarrySums(guide.signature)(guide.graph_module).reason == "nothing is summed up over time"


def test_what_has_no_time_is_left_alone():
    image = captured.resnet()
    assert CarrySums(image.signature)(image.graph_module).reason == "there is no single dimension of time"


def test_steps_that_hold_nothing_add_nothing():
    x, mask = models.vectors(2, 5, WIDTH), torch.tensor([[True] * 5, [False, False, True, True, True]])
    sums, after = RunningSum(1)(x, mask=mask)
    torch.testing.assert_close(sums[1, 2:], x[1, 2:].cumsum(0))
    assert torch.equal(after, sums[:, -1])


@pytest.mark.parametrize("fold", ["product", "logsumexp", "largest", "least"])
def test_steps_that_hold_nothing_change_nothing(fold):
    x, mask = models.vectors(2, 5, WIDTH), torch.tensor([[True] * 5, [False, False, True, True, True]])
    module = RunningFold(1, fold)
    folds, after = module(x, mask=mask)
    torch.testing.assert_close(folds[1, 2:], module(x[1:, 2:])[0][0])
    _, still = module(x[1:, :2], mask=mask[1:, :2])
    assert torch.equal(still, torch.zeros(1, WIDTH, 2))  # as at the start
    rest, last = module(x[1:, 2:], still, mask[1:, 2:])
    torch.testing.assert_close(rest[0], folds[1, 2:])
    torch.testing.assert_close(last[0], after[1])


def example() -> Example:
    guide = looking_back("linear_attention")
    return Example(CarrySums(guide.signature), guide.graph_module, (models.vectors(3, 9, WIDTH),))
