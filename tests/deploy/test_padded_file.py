"""A file serves a padded batch row by row: what is hidden changes nothing, with a state too.

B batch, T time
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests import models
from tests.models import tokens
from thesean.deploy.export import ExportReport, export
from thesean.deploy.session import Session
from thesean.passes.capture.capture import capture
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target

pytest.importorskip("onnxscript")

# right, middle, left, all, and none
MASK_BT = np.array(
    [[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]
)
IDS_BT = tokens(5, 7, seed=6).numpy()


def exported(guide: nn.Module, targets: list[str | Target], folder) -> tuple[Hybrid, ExportReport]:
    """One file with a family in each layer."""
    example = {"input_ids": tokens(), "attention_mask": torch.ones(4, models.LENGTH, dtype=torch.long)}
    captured = capture(guide, example)
    torch.manual_seed(0)
    hybrid = build_hybrid(make_plan(captured, {f"*.{k}": target for k, target in enumerate(targets)}))
    assert all(r.masks for r in hybrid.replacements)
    with torch.no_grad():  # untrained ones barely speak
        for r in hybrid.replacements:
            nn.init.normal_(hybrid.module(r).last.weight, std=0.3)  # type: ignore[arg-type]
    return hybrid, export(hybrid.graph_module, captured.signature, folder / "m.onnx")


def rows() -> list[tuple[int, np.ndarray]]:
    """(row, its tokens in a row)."""
    return [(row, IDS_BT[row][seen == 1][None]) for row, seen in enumerate(MASK_BT) if seen.any()]


@pytest.mark.thorough
def test_an_encoders_row_is_the_sentence_alone(tmp_path):
    families: list[str | Target] = ["linear-attention", "gru", "delta", "reservoir", "conv", "lstm", "narrow-heads"]
    _, report = exported(models.bert(layers=len(families)), families, tmp_path)
    session = Session(report.path)
    hidden, _ = session.run({"input_ids": IDS_BT, "attention_mask": MASK_BT})
    # the guide's learned positions count hidden steps too: only what is hidden at the end leaves a row as it is
    alone, _ = session.run({"input_ids": IDS_BT[:1, :4], "attention_mask": MASK_BT[:1, :4]})
    np.testing.assert_allclose(hidden["last_hidden_state"][:1, :4], alone["last_hidden_state"], rtol=0, atol=1e-5)
    moved = np.where(MASK_BT == 1, IDS_BT, (IDS_BT + 5) % models.VOCABULARY)
    again, _ = session.run({"input_ids": moved, "attention_mask": MASK_BT})
    for row in range(4):
        seen = MASK_BT[row] == 1
        found, expected = (each["last_hidden_state"][row, seen] for each in (again, hidden))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_a_decoders_row_is_the_sentence_alone_and_goes_on_from_its_own_state(tmp_path):
    families: list[str | Target] = [
        "lstm",
        Target("linear-attention", window=3),
        "ssm",
        "conv",
        "elman",
        "reservoir",
        "mingru",
    ]
    hybrid, report = exported(models.llama(layers=len(families)), families, tmp_path)
    assert report.stateful
    session, torch_logits = Session(report.path), hybrid.graph_module
    padded, state = session.run({"input_ids": IDS_BT, "attention_mask": MASK_BT})
    ones = np.ones((5, 1), np.int64)
    after, _ = session.run({"input_ids": IDS_BT[:, :1], "attention_mask": ones}, state)
    for row, ids_1T in rows():
        longer = np.concatenate([ids_1T, IDS_BT[row : row + 1, :1]], 1)
        alone, _ = session.run({"input_ids": longer, "attention_mask": np.ones_like(longer)})
        in_torch = torch_logits(*(torch.from_numpy(x) for x in (longer, np.ones_like(longer))))["logits"].detach()
        np.testing.assert_allclose(alone["logits"], in_torch, rtol=0, atol=1e-5)
        seen = MASK_BT[row] == 1
        np.testing.assert_allclose(padded["logits"][row, seen], alone["logits"][0, :-1], rtol=0, atol=1e-5)
        np.testing.assert_allclose(after["logits"][row, 0], alone["logits"][0, -1], rtol=0, atol=1e-5)
