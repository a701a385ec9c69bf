"""Losses and metrics of Thesean's own, worked by hand or by torch's cross-entropy.

B batch, T time, V classes
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.models import vectors
from thesean.distill.losses import accuracy, as_the_guide, cross_entropy, labels_are_inputs, next_token, warn_of_chance
from thesean.errors import DataError

LOGITS_BTV = vectors(2, 4, 5)
IDS_BT = torch.tensor([[3, 0, 4, 1], [2, 2, 0, 4]])
SHIFTED = F.cross_entropy(LOGITS_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten())


def graded(gradients: bool) -> Any:
    return torch.enable_grad() if gradients else torch.no_grad()


@pytest.mark.parametrize("gradients", [True, False])
def test_cross_entropy_is_asked_for_the_labels_that_count(gradients):
    logits_BV, y_B = vectors(3, 5), torch.tensor([4, -100, 0])
    log_NV = logits_BV.log_softmax(-1)
    wanted = -(log_NV[0, 4] + log_NV[2, 0]) / 2
    with graded(gradients):
        for batch in ((vectors(3, 2), y_B), {"x": vectors(3, 2), "labels": y_B}):
            torch.testing.assert_close(cross_entropy(logits_BV, batch), wanted)
            torch.testing.assert_close(cross_entropy({"logits": logits_BV}, batch), wanted)
        a_step = cross_entropy(LOGITS_BTV, (vectors(2, 4), IDS_BT))
        torch.testing.assert_close(a_step, F.cross_entropy(LOGITS_BTV.flatten(0, 1), IDS_BT.flatten()))


def test_classes_may_stand_where_torch_has_them():
    torch.testing.assert_close(
        cross_entropy(LOGITS_BTV.mT, (vectors(2, 4), IDS_BT)), cross_entropy(LOGITS_BTV, (vectors(2, 4), IDS_BT))
    )
    images, classes = vectors(2, 3, 4, 6), torch.zeros(2, 4, 6, dtype=torch.long)
    torch.testing.assert_close(cross_entropy(images, (vectors(2, 4), classes)), F.cross_entropy(images, classes))
    assert accuracy(F.one_hot(IDS_BT, 5).mT.float(), (vectors(2, 4), IDS_BT)) == 1
    square_BTV = vectors(2, 4, 4)  # either could be meant: the last
    wanted = F.cross_entropy(square_BTV.flatten(0, 1), IDS_BT.clamp(max=3).flatten())
    torch.testing.assert_close(cross_entropy(square_BTV, (vectors(2, 4), IDS_BT.clamp(max=3))), wanted)


def test_half_precision_is_summed_in_single():
    logits_BV, y_B = vectors(3, 5).half(), torch.tensor([4, 1, 0])
    found = cross_entropy(logits_BV, (vectors(3, 2), y_B))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits_BV.float(), y_B))


def test_labels_that_are_the_ids_are_asked_for_one_step_later():
    torch.testing.assert_close(cross_entropy(LOGITS_BTV, {"input_ids": IDS_BT, "labels": IDS_BT.clone()}), SHIFTED)
    padded_BT = IDS_BT.clone()
    padded_BT[0, 3] = -100
    wanted = F.cross_entropy(LOGITS_BTV[:, :-1].flatten(0, 1), padded_BT[:, 1:].flatten())
    torch.testing.assert_close(cross_entropy(LOGITS_BTV, {"input_ids": IDS_BT, "labels": padded_BT}), wanted)
    right_BTV = F.one_hot(IDS_BT.roll(-1, 1), 5).float()
    right_BTV[0, 1] = right_BTV[0, 1].roll(1)
    assert accuracy(right_BTV, {"input_ids": IDS_BT, "labels": IDS_BT}) == pytest.approx(5 / 6)


def test_whether_labels_are_the_ids():
    other_BT = IDS_BT.clone()
    other_BT[1, 1] = 0
    asked: list[tuple[Any, bool]] = [
        ({"input_ids": IDS_BT, "labels": IDS_BT}, True),
        ({"input_ids": IDS_BT, "labels": IDS_BT.masked_fill(IDS_BT == 2, -100)}, True),
        ({"input_ids": IDS_BT, "labels": IDS_BT.masked_fill(IDS_BT >= 0, -100)}, False),
        ({"input_ids": IDS_BT, "labels": other_BT}, False),
        ({"input_ids": IDS_BT, "labels": IDS_BT[:, 0]}, False),
        ({"input_ids": IDS_BT[:, :1], "labels": IDS_BT[:, :1]}, False),
        ({"input_ids": IDS_BT[0], "labels": IDS_BT[0]}, False),
        ({"input_ids": IDS_BT}, False),
        ({"input_ids": [1, 2], "labels": IDS_BT}, False),
        ({"x": IDS_BT, "labels": IDS_BT}, False),
        ((IDS_BT, IDS_BT), True),
        ((IDS_BT.float(), IDS_BT), False),
        (({"input_ids": IDS_BT}, IDS_BT), True),
        ({"input_ids": IDS_BT, "labels": IDS_BT, "decoder_input_ids": IDS_BT}, False),
    ]
    assert [labels_are_inputs(batch) for batch, _ in asked] == [found for _, found in asked]
    assert labels_are_inputs({"input_ids": IDS_BT[:, :2], "labels": IDS_BT[:, :2]})


@pytest.mark.parametrize("gradients", [True, False])
def test_the_next_token_is_asked_for_wherever_the_ids_stand(gradients):
    with graded(gradients):
        for batch in (IDS_BT, (IDS_BT, vectors(2)), {"input_ids": IDS_BT}, ({"input_ids": IDS_BT}, vectors(2))):
            torch.testing.assert_close(next_token(LOGITS_BTV, batch), SHIFTED)


def test_padding_is_neither_asked_for_nor_asked():
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])
    log_BTV = LOGITS_BTV.log_softmax(-1)
    wanted = -(log_BTV[0, 1, 4] + log_BTV[0, 2, 1] + log_BTV[1, 0, 2]) / 3
    torch.testing.assert_close(next_token(LOGITS_BTV, {"input_ids": IDS_BT, "attention_mask": mask_BT}), wanted)
    other = {"input_ids": IDS_BT, "attention_mask": torch.zeros(2, 1, 4, 4)}  # of no token's own
    torch.testing.assert_close(next_token(LOGITS_BTV, other), SHIFTED)


def test_accuracy_is_the_share_of_labels_that_count():
    logits_BV = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert accuracy(logits_BV, (None, torch.tensor([1, 0, 0, -100]))) == pytest.approx(2 / 3)


def test_labels_that_do_not_fit_are_told():
    for of in (cross_entropy, accuracy):
        with pytest.raises(DataError, match=r"^the batch has no labels: .* with 'labels', found 'x'\. Say where"):
            of(vectors(3, 5), {"x": vectors(3, 2)})
        with pytest.raises(DataError, match=r"^labels of shape \(2,\) don't fit logits of \(3, classes\)\.$"):
            of(vectors(3, 5), (vectors(3, 2), torch.tensor([0, 1])))


def test_labels_that_are_the_inputs_are_asked_as_the_guide_answers_them():
    batch = {"input_ids": IDS_BT, "labels": IDS_BT}
    copying, foretelling = (9 * F.one_hot(ids_BT, 5).float() for ids_BT in (IDS_BT, IDS_BT.roll(-1, 1)))
    for logits_BTV, ahead, own, places in (
        (copying, False, F.cross_entropy(copying.flatten(0, 1), IDS_BT.flatten()), "where they stand"),
        (
            foretelling,
            True,
            F.cross_entropy(foretelling[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()),
            "one step ahead",
        ),
    ):
        loss, metric, told = as_the_guide(cross_entropy, accuracy, partial(torch.clone, logits_BTV), batch)
        assert loss is not None
        assert metric is not None
        assert told is not None
        torch.testing.assert_close(loss(logits_BTV, batch), own)
        assert metric(logits_BTV, batch) == 1
        assert (loss is cross_entropy) == (metric is accuracy) == ahead
        assert told.startswith(f"labels are the inputs, asked {places} (the guide's loss is {own:.2f} nats so, ")
        other = "where they stand" if ahead else "one step ahead"
        assert told.endswith(f"{other})")
    given: tuple[Any, Any]
    for given in ((cross_entropy, None), (None, accuracy)):  # the other one is the user's, or there is none
        found = as_the_guide(given[0], given[1], lambda: copying, batch)
        assert [f is None for f in found] == [given[0] is None, given[1] is None, False]
        assert found[:2] != given


def test_of_other_labels_and_losses_the_guide_is_not_asked():
    def run() -> Any:
        raise AssertionError("the guide was run")

    own: Any = next_token
    for loss, metric, batch in (
        (cross_entropy, accuracy, (vectors(3, 2), torch.tensor([0, 1, 2]))),
        (own, None, {"input_ids": IDS_BT, "labels": IDS_BT}),
    ):
        assert as_the_guide(loss, metric, run, batch) == (loss, metric, None)


def test_a_guide_that_only_guesses_is_told():
    y_B = torch.arange(8) % 4
    batch, right = (vectors(8, 2), y_B), F.one_hot(y_B, 4).float()
    told = warn_of_chance(cross_entropy, lambda: torch.zeros(8, 4), batch)
    assert told is not None
    assert told.startswith("the guide's loss is 1.39 nats on a held-out batch, no better than a uniform guess over 4 ")
    assert "(1.39)" in told
    assert warn_of_chance(cross_entropy, lambda: -right, batch) is not None  # and one that is worse
    assert warn_of_chance(cross_entropy, lambda: torch.zeros(8, 2), (vectors(8, 2), y_B % 2)) is not None
    assert warn_of_chance(cross_entropy, lambda: right * torch.nan, batch) is None  # which others tell
    assert warn_of_chance(cross_entropy, lambda: 0.1 * right, batch) is None
    assert warn_of_chance(lambda *_: 1 / 0, lambda: torch.zeros(8, 4), batch) is None
    assert warn_of_chance(cross_entropy, lambda: torch.zeros(8, 1), (vectors(8, 2), torch.zeros(8).long())) is None
    assert warn_of_chance(next_token, lambda: torch.zeros(2, 4, 5), IDS_BT) is not None
