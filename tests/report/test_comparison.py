"""The table, the JSON and the heatmap of a comparison."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from thesean.errors import MissingExtraError
from thesean.report.comparison import Comparison

HEAD = (
    "cka-debiased, debiased HSIC over minibatches: Guide (rows) and Student (columns), 64 examples, "
    "3 in batches too small to count"
)


def comparison(rows: int = 2, columns: int = 2) -> Comparison:
    matrix = torch.linspace(-0.05, 1, rows * columns, dtype=torch.float64).view(rows, columns)
    matrix[0, 1] = torch.nan
    return Comparison(
        measure="cka-debiased",
        estimator="debiased HSIC over minibatches",
        name_a="Guide",
        name_b="Student",
        layers_a=tuple(f"encoder.layer.{i}" for i in range(rows)),
        layers_b=tuple(f"h.{i}" for i in range(columns)),
        matrix=matrix,
        examples=64,
        skipped=3,
    )


def test_the_table_has_a_line_a_layer():
    assert str(comparison()).splitlines() == [
        HEAD,
        "                   h.0    h.1",
        "encoder.layer.0  -0.050      -",
        "encoder.layer.1  0.650  1.000",
    ]


def test_a_table_too_wide_for_a_terminal_numbers_its_columns():
    lines = str(comparison(2, 30)).splitlines()
    assert "[29]" in lines[1]
    assert lines[-1] == "[29] h.29"


def test_json_holds_the_matrix_with_null_for_what_is_not_a_number(tmp_path):
    made = comparison()
    values = json.loads(made.to_json(tmp_path / "c.json").read_text())
    assert values["matrix"] == [[-0.05, None], [pytest.approx(0.65), 1.0]]
    assert values["layers_a"] == ["encoder.layer.0", "encoder.layer.1"]
    assert (values["measure"], values["examples"], values["skipped"]) == ("cka-debiased", 64, 3)


@pytest.mark.parametrize("size", [(2, 2), (5, 20)])
def test_the_heatmap_is_a_picture_with_more_than_one_colour(tmp_path, size):
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(comparison(*size).plot(tmp_path / "heatmap.png"))
    assert pixels.shape[0] > 200
    assert len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).tolist()}) > 20


def test_without_matplotlib_the_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'thesean-compiler\[report\]'"):
        comparison().plot(tmp_path / "heatmap.png")
