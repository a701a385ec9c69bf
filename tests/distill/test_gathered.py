"""What is told of a batch whose rows are shared by ranks, with the other rank's rows made up.

B batch, D width, C classes
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import models
from tests.models import vectors
from thesean.distill.gathered import Gathered
from thesean.distill.outputs import Outputs
from thesean.passes.capture.capture import capture

KINDS = Outputs(kinds={"classes": "softmax", "hidden": "mse"})


class Two(nn.Module):
    """x_BD -> classes_BC and what they were read off."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden_BD = torch.tanh(self.hidden(x))
        return {"classes": self.head(hidden_BD), "hidden": hidden_BD}


@pytest.fixture
def gathered() -> Gathered:
    return Gathered(capture(models.seeded(Two), {"x": vectors(4, 4)}).graph_module)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has the same rows, turned to their negatives."""
    monkeypatch.setattr("thesean.distill.gathered.ranks.count", lambda: 2)
    monkeypatch.setattr(
        "thesean.distill.gathered.exchange.gather",
        lambda x, dim=0, *_, **__: torch.cat([x, x.logical_not() if x.dtype == torch.bool else -x], dim),
    )


def given() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    output = {"classes": vectors(2, 3), "hidden": vectors(2, 6, seed=1)}
    return output, {"classes": torch.tensor([True, False]), "hidden": torch.tensor([True, True])}


def test_alone_a_process_has_all_rows(gathered):
    output, masks = given()
    assert gathered.outputs(KINDS, output, output, masks) == (output, output, masks)
    assert gathered.output(output) is output


@pytest.mark.usefixtures("two_ranks")
def test_of_classes_a_rank_compares_its_own_rows_and_of_all_else_everyones(gathered):
    output, masks = given()
    found, guide, seen = gathered.outputs(KINDS, output, output, masks)
    for each in (found, guide):
        assert torch.equal(each["classes"], output["classes"])
        assert torch.equal(each["hidden"], torch.cat([output["hidden"], -output["hidden"]]))
    assert {name: mask.tolist() for name, mask in seen.items()} == {
        "classes": [True, False],
        "hidden": [True, True, False, False],
    }


@pytest.mark.usefixtures("two_ranks")
def test_a_loss_is_given_all_rows_unless_it_takes_a_ranks_own(gathered):
    output, _ = given()

    def whole(output: object, batch: object) -> None: ...

    def own(output: object, batch: object) -> None: ...

    own.by_rows = True  # type: ignore[attr-defined]
    assert {k: len(v) for k, v in gathered.given(whole, output).items()} == {"classes": 4, "hidden": 4}
    assert gathered.given(own, output) is output
