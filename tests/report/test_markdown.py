from __future__ import annotations

from pathlib import Path

import pytest

from thesean.report import Row, markdown_table, read_report, write_report

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.13.0",
    "cpu": "Chip",
    "cores": 2,
    "threads": 1,
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
}
ROWS = [
    Row(name="guide", loss=1.3, params=1_000_000),
    Row(name="converted", loss=1.4, params=900_000, steps=4, seconds=1),
    Row(name="scratch", loss=1.5, params=900_000, steps=4, seconds=1),
]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_report(tmp_path / "demo.json", ROWS, environment=ENVIRONMENT, extra={"seed": 3})


VERDICT = (
    "Converted beats scratch: its loss 1.4000 is 0.1000 below scratch's, all at 4 optimizer steps. "
    "That is 0.1000 above the guide's."
)


def test_the_markdown_table_with_its_provenance(report: Path) -> None:
    assert markdown_table(read_report(report)).splitlines() == [
        "| | guide | converted | scratch |",
        "|---|---:|---:|---:|",
        "| loss | 1.3000 | 1.4000 | 1.5000 |",
        "| parameters | 1 M | 900 k | 900 k |",
        "| training steps | - | 4 | 4 |",
        "| training time | - | 1.0 s | 1.0 s |",
        "",
        VERDICT,
        "",
        "Measured on Chip, 2 cores, 1 thread, Python 3.11.7, torch 2.13.0, commit abc, seed 3, 2026-01-02.",
    ]
