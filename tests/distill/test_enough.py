"""B batch, T time"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import captured
from tests.distill.tools import batches_of, drafted, task, training
from thesean.distill import enough as module
from thesean.distill.enough import enough
from thesean.distill.task import Batch
from thesean.passes.capture.captured import Captured
from thesean.recipe import ClosedForm, Recipe
from thesean.targets import Target

WIDE = Target("mlp", width=16)  # of whose features there are to be 512 rows


def read(*asked: Any, **settings: Any) -> int:
    """How many batches."""
    return len(found(*asked, **settings)[0])


def found(
    guide: Captured, batches: Iterable[Batch], target: Any = WIDE, form: ClosedForm | None = None, **settings: Any
) -> tuple[list[Batch], str]:
    bound_plan, hybrid = drafted(guide, target, **settings)
    first = batches_of(guide, 1)
    given = training(guide, task(), Recipe(closed_form=form or ClosedForm()), batches=first, held_out=first)
    given = replace(given, feed=replace(given.feed, batches=batches))
    return enough(given, hybrid, bound_plan.captured.signature)


@pytest.mark.parametrize(("size", "count"), [(4, 128), (16, 32), (32, 16), (256, 16)])
def test_a_closed_form_reads_enough_rows_however_small_a_batch_is(size, count):
    guide = captured.mlp()
    assert read(guide, batches_of(guide, 200, size)) == count


def test_the_widest_layer_of_all_parts_says_how_many_they_are():
    guide = captured.mlp()
    assert read(guide, batches_of(guide, 200, 16), {"0*": WIDE, "2*": Target("mlp", width=32)}) == 64


@pytest.mark.parametrize(
    ("form", "count"), [(ClosedForm(batches=3), 3), (ClosedForm(batches=40), 40), (ClosedForm(enabled=False), 16)]
)
def test_a_number_that_was_asked_for_is_what_is_read(form, count):
    guide = captured.mlp()
    assert read(guide, batches_of(guide, 60, 4), form=form) == count


def test_short_data_is_read_whole():
    guide = captured.mlp()
    assert read(guide, batches_of(guide, 20, 4)) == 20


@pytest.mark.parametrize(
    ("size", "count", "told"),
    [
        (4, 200, "closed form: 128 batches were read, in which a feature is seen in 32 rows"),
        (4, 20, "closed form: 20 batches were read, in which a feature is seen in 5 rows; 32 would be enough"),
        (4, 3, "closed form: 3 batches were read, in which a feature is seen in 0.75 rows; 32 would be enough"),
        (64, 20, ""),
    ],
)
def test_what_is_told_of_how_many_were_read(size, count, told):
    guide = captured.mlp()
    assert found(guide, batches_of(guide, count, size))[1] == told


def test_data_without_an_end_is_read_no_further_than_it_takes():
    guide, taken = captured.mlp(), 0

    def endless() -> Iterator[Batch]:
        nonlocal taken
        for batch in itertools.cycle(batches_of(guide, 3, 16)):
            taken += 1
            yield batch

    assert read(guide, endless()) == 32
    assert taken == 32


@pytest.mark.parametrize(("forward", "count"), [(0.001, 128), (0.25, 40), (1.0, 16)])
def test_of_a_budget_of_time_a_quarter_is_read_at_six_forwards_a_batch(forward, count, monkeypatch):
    guide, clock = captured.mlp(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    forwarded = guide.graph_module.register_forward_hook(lambda *given: clock.__setitem__(0, clock[0] + forward))
    try:
        given = Recipe(seconds=240.0 + forward)
        bound_plan, hybrid = drafted(guide, WIDE)
        told = training(guide, task(), given, batches=batches_of(guide, 200, 4), held_out=batches_of(guide, 1))
        told = replace(told, begun=0.0)
        assert len(enough(told, hybrid, bound_plan.captured.signature)[0]) == count
    finally:
        forwarded.remove()


@pytest.mark.parametrize(("target", "count"), [(Target("mlp", width=2), 64), (Target("conv-2d", expand=32), 30)])
def test_a_row_is_an_image_where_it_is_flattened_and_a_place_where_it_is_not(target, count):
    """Images of 6 x 6 places, one a batch: 64 rows for 2 features, and 1,056 for 33."""
    guide = captured.convnet()
    assert read(guide, batches_of(guide, 200, 1), target, keep=["[!0]*"]) == count


@pytest.mark.parametrize(("shown", "count"), [(8, 32), (2, 128)])
def test_padding_is_no_row(shown, count):
    guide = captured.bert()
    batches = batches_of(guide, 400, 2, time=8)
    for _, inputs in batches:
        inputs["attention_mask"] = (torch.arange(8) < shown).long().expand(2, 8).contiguous()
    assert read(guide, batches, Target("linear-attention", window=None), granularity="sublayer") == count


def test_images_are_not_kept_past_so_many_bytes(monkeypatch):
    guide = captured.mlp()
    batches = batches_of(guide, 200, 4)
    size = sum(value.nbytes for value in batches[0][1].values())
    monkeypatch.setattr(module, "_MOST_BYTES", 24 * size)
    assert read(guide, batches) == 24
    monkeypatch.setattr(module, "_MOST_BYTES", 2 * size)
    assert read(guide, batches) == 16
