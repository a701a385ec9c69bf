from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.distill.tools import task
from tests.models import vectors
from thesean.distill.task import primary, task_loss, try_loss
from thesean.errors import DataError


def test_the_primary_output_is_logits_or_the_first_floating_tensor():
    x, ids = vectors(2, 3), torch.ones(2, dtype=torch.long)
    assert primary({"hidden": vectors(2, 4), "logits": x}) is x
    assert primary((ids, [x])) is x
    assert primary(x) is x


@pytest.mark.parametrize("output", [torch.ones(2, dtype=torch.long), (), {"a": None}, torch.tensor(1.0)])
def test_an_output_with_nothing_to_match_is_refused(output):
    with pytest.raises(DataError, match="no floating-point tensor"):
        primary(output)


def test_a_loss_is_one_number_that_a_gradient_flows_from():
    y = vectors(2, 3).requires_grad_()
    for loss in (lambda output, batch: (output * batch).sum(), lambda output, batch: (output * batch).sum().reshape(1)):
        found = task_loss(task(loss, output="mse"), y, 2.0)
        (slope,) = torch.autograd.grad(found, y)
        assert torch.equal(slope, torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (lambda y: y, r"a tensor of shape \(2, 3\)"),
        (lambda y: y.detach().sum(), r"a tensor of shape \(\)"),
        (lambda y: y.sum().item(), "float"),
        (lambda y: None, "NoneType"),
    ],
)
def test_what_nothing_can_be_trained_on_is_told(given, found):
    what = task(lambda output, batch: given(output), output="mse")
    with pytest.raises(DataError, match=rf"returned {found}; expected a scalar tensor computed from output"):
        task_loss(what, vectors(2, 3).requires_grad_(), None)


def test_a_loss_is_tried_on_the_guides_output_before_anything_is_solved():
    y, mean = vectors(2, 3), task(lambda output, batch: output.mean(), output="mse")
    assert try_loss(mean, y, None, trains=True) is None
    assert not y.requires_grad
    plain = task(lambda output, batch: torch.tensor(output.mean().item()), output="mse")
    assert try_loss(plain, y, None, trains=False) is None  # it is only judged by
    with pytest.raises(DataError, match="expected a scalar tensor computed from output"):
        try_loss(plain, y, None, trains=True)


def test_a_loss_that_is_drawn_is_told_and_draws_nothing_from_the_caller():
    drawn = task(lambda output, batch: output.mean() + torch.rand(()), output="mse")
    before = torch.get_rng_state()
    told = try_loss(drawn, vectors(2, 3), None, trains=True)
    assert told is not None
    assert "for the same output" in told
    assert torch.equal(torch.get_rng_state(), before)


def shifted(output, batch):
    batch["labels"].sub_(1)
    return output.mean()


def hidden(output, batch):
    batch["labels"][batch["labels"] == 3] = -100
    return output.mean()


def more(output, batch):
    batch["mask"] = batch["labels"] > 0
    return output.mean()


@pytest.mark.parametrize(
    ("loss", "of", "told"),
    [
        (shifted, "labels", "changes its batch, and once more each time"),
        (shifted, "ids", "changes ids of its batch, which the guide reads"),
        (hidden, "ids", "changes ids of its batch, which the guide reads"),
        (hidden, "labels", None),  # the second time it changes nothing
        (more, "labels", None),
    ],
)
def test_a_loss_that_changes_what_a_later_pass_reads_is_told(loss, of, told):
    batch = {"ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[3.0, float("nan")]])}
    if of == "ids":
        batch["labels"] = batch["ids"]
    what = task(loss, output="mse")
    with pytest.raises(DataError, match=told) if told else nullcontext():
        assert try_loss(what, vectors(2, 3), batch, trains=False, inputs={"ids": batch["ids"]}) is None
