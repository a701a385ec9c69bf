"""A report of a conversion, told in lines, and read again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from thesean.curve import Curve
from thesean.errors import DataError
from thesean.report.conversion import ConversionReport, StageRow

STAGE = StageRow(
    part="blocks.0", replaced=1, of=2, measure="cka", before=0.5, after=0.25, loss=1.5, metric=None, divergence=0.125,
    steps=3, seconds=1.0, stopped_by="plateau", params=10, flops=20,
)  # fmt: skip
CURVE = Curve(
    phase="align", part="blocks.0", learning_rate=1e-3, steps=3, every=1, losses=(1.0,), held_out=((0, 0.5),), kept=0
)
REPORT = ConversionReport(
    guide={"loss": 1.0, "metric": None},
    converted={"loss": 1.25, "metric": 0.5},
    stages=(STAGE, replace(STAGE, part="blocks.1", replaced=2, before=None, loss=None)),
    steps=3,
    seconds=61.2,
    params=10,
    flops=20,
    train_length=None,
    recipe={"name": "fast"},
    seed=0,
    notes=("a note",),
    curves=(CURVE,),
)


def test_a_report_tells_stages_figures_curves_and_notes():
    lines = str(REPORT).splitlines()
    assert lines[1].split() == ["1", "of", "2", "1.5000", "0.1250", "0.5000", "0.2500", "3", "blocks.0"]
    assert lines[2].split() == ["2", "of", "2", "0.1250", "0.2500", "3", "blocks.1"]
    assert lines[3:] == [
        "guide: loss 1.0000",
        "converted: loss 1.2500, metric 0.5000",
        str(CURVE),
        "3 steps, 61 s",
        "note: a note",
    ]


def test_where_no_loss_was_given_it_says_so():
    assert "guide: no loss given" in str(replace(REPORT, guide={"loss": None, "metric": None}))


def test_a_report_is_read_as_it_was_written():
    assert ConversionReport.from_json(json.dumps(REPORT.to_dict())) == REPORT


@pytest.mark.parametrize("text", ["", "[]", "5", "null", '{"guide": {}}', json.dumps({**REPORT.to_dict(), "more": 1})])
def test_what_is_no_report_is_told(text):
    with pytest.raises(DataError, match="this is no report of a conversion"):
        ConversionReport.from_json(text)
