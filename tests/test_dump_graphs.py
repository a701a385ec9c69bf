"""A conversion's graphs, written down as they change: read in order, they tell what happened to the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import thesean
from tests.models import seeded, vectors
from thesean.cli.app import app
from thesean.errors import WriteError


class Toy(nn.Module):
    """x -> two layers that become something else, and a head; `x.float()` is idle and `add_` writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        nn.init.eye_(self.second.weight)  # so that it can be left out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.float())
        return self.head(self.second(x).add_(1))


def convert(folder: Path | None) -> thesean.Converted:
    return thesean.compile(
        seeded(Toy),
        {"first": "linear", "second": "identity"},
        data=[vectors(8, 4, seed=i) for i in range(3)],
        parts=["first", "second"],
        recipe="fast",
        progress=False,
        dump_graphs=folder,
    )


def story(folder: Path) -> dict[str, list[str]]:
    """Each file's lines but those that read parameters."""
    files = sorted(folder.glob("*.txt"))
    return {p.name: [line for line in p.read_text().splitlines() if "get_attr" not in line] for p in files}


def test_the_graphs_of_a_conversion_read_as_a_story(tmp_path):
    converted = convert(tmp_path)
    told = story(tmp_path)
    asserted = "_assert_tensor_metadata"
    last = told["011-remove-second.txt"][1:]
    assert told == {
        "000-capture.txt": [
            "# capture: as torch.export traced it",
            "x = placeholder x",
            f"{asserted}_default = aten.{asserted}.default(x, dtype=torch.float32, device=cpu, layout=torch.strided)",
            "to = aten.to.dtype(x, torch.float32)",
            "linear = aten.linear.default(to, first_weight, first_bias)",
            "linear_1 = aten.linear.default(linear, second_weight, second_bias)",
            "add_ = aten.add_.Tensor(linear_1, 1)",
            "linear_2 = aten.linear.default(add_, head_weight, head_bias)",
            "return linear_2",
        ],
        "001-inline-regions.txt": [
            "# inline-regions: unchanged: the graph has no region of its own",
            *told["000-capture.txt"][1:],
        ],
        "002-split-layers.txt": [
            "# split-layers: unchanged: the graph has no recurrent cell",
            *told["000-capture.txt"][1:],
        ],
        "003-functionalise.txt": [
            "# functionalise: modified",
            *(line.replace("aten.add_.", "aten.add.") for line in told["000-capture.txt"][1:]),
        ],
        "004-writes-into-views.txt": [
            "# writes-into-views: unchanged: no operator writes into its input",
            *told["003-functionalise.txt"][1:],
        ],
        "005-views-as-reshapes.txt": [
            "# views-as-reshapes: unchanged: no view hangs on how memory lies",
            *told["003-functionalise.txt"][1:],
        ],
        "006-write-out-operators.txt": [
            "# write-out-operators: unchanged: no operator is to be written out",
            *told["003-functionalise.txt"][1:],
        ],
        "007-write-out-sizes.txt": [
            "# write-out-sizes: unchanged: all that is done with sizes can be saved",
            *told["003-functionalise.txt"][1:],
        ],
        "008-simplify.txt": [
            "# simplify: modified",
            "x = placeholder x",
            "linear = aten.linear.default(x, first_weight, first_bias)",
            "linear_1 = aten.linear.default(linear, second_weight, second_bias)",
            "add_ = aten.add.Tensor(linear_1, 1)",
            "linear_2 = aten.linear.default(add_, head_weight, head_bias)",
            "return linear_2",
        ],
        "009-latents-side-by-side.txt": [
            "# latents-side-by-side: unchanged: no attention reads a latent beside something else",
            "x = placeholder x",
            "linear = aten.linear.default(x, first_weight, first_bias)",
            "linear_1 = aten.linear.default(linear, second_weight, second_bias)",
            "add_ = aten.add.Tensor(linear_1, 1)",
            "linear_2 = aten.linear.default(add_, head_weight, head_bias)",
            "return linear_2",
        ],
        "010-substitute-first.txt": [
            "# substitute first: modified",
            "x = placeholder x",
            "part_0 = part_0(x)",
            "linear_1 = aten.linear.default(part_0, second_weight, second_bias)",
            "add_ = aten.add.Tensor(linear_1, 1)",
            "linear_2 = aten.linear.default(add_, head_weight, head_bias)",
            "return linear_2",
        ],
        "011-remove-second.txt": [
            "# remove second: modified",
            "x = placeholder x",
            "part_0 = part_0(x)",
            "part_1 = part_1(part_0)",
            "add_ = aten.add.Tensor(part_1, 1)",
            "linear_2 = aten.linear.default(add_, head_weight, head_bias)",
            "return linear_2",
        ],
        "012-bound-positions.txt": [
            "# bound-positions: unchanged: no table is indexed by a growing position",
            *last,
        ],
    }
    assert len(converted.frontier) == 3
    assert converted.frontier[1].module is not converted.module
    assert story(tmp_path) == told  # what is made later is no step of it


def test_a_plan_writes_what_capture_made_of_the_guide_and_nothing_that_it_times(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    convert(tmp_path / "converted")
    plan = thesean.plan(
        seeded(Toy),
        "linear",
        data=[vectors(8, 4)],
        parts=["first", "second"],
        batch=1,
        dump_graphs=tmp_path / "planned",
    )
    assert plan.latencies
    told = story(tmp_path / "converted")
    assert story(tmp_path / "planned") == {name: told[name] for name in sorted(told)[:10]}


def test_the_result_is_the_same_with_and_without(tmp_path):
    told, untold = convert(tmp_path / "graphs"), convert(None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graphs"]
    x = vectors(5, 4)
    assert torch.equal(told(x), untold(x))


NO_TIME = "expected inputs with one dynamic time dimension, found none (dynamic= says which one is time)."


def test_an_export_goes_on_where_the_conversion_ended(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    converted = convert(tmp_path)
    before = story(tmp_path)
    converted.export(tmp_path / "m.onnx", dump_graphs=tmp_path)
    told = story(tmp_path)
    assert {k: v for k, v in told.items() if k in before} == before
    graph = before["012-bound-positions.txt"][1:]
    assert {k: v for k, v in told.items() if k not in before} == {
        "013-freeze-on-cpu.txt": ["# freeze-on-cpu: modified", *graph],
        "014-cast-floats.txt": ["# cast-floats: unchanged: nothing in it is another precision", *graph],
        "015-slices-of-joins.txt": [
            "# slices-of-joins: unchanged: no slice is a piece of what was joined",
            *graph,
        ],
        "016-cache-latents.txt": ["# cache-latents: unchanged: there is no single dimension of time", *graph],
        "017-inline-modules.txt": [
            "# inline-modules: unchanged: no module without a state reads earlier steps",
            *graph,
        ],
        "018-cache-attention.txt": ["# cache-attention: unchanged: there is no single dimension of time", *graph],
        "019-cache-steps.txt": ["# cache-steps: unchanged: there is no single dimension of time", *graph],
        "020-carry-sums.txt": ["# carry-sums: unchanged: there is no single dimension of time", *graph],
        "021-carry-cells.txt": ["# carry-cells: unchanged: there is no single dimension of time", *graph],
        "022-memories-as-modules.txt": [
            "# memories-as-modules: unchanged: the graph has no recurrence of matrices",
            *graph,
        ],
        "023-delay-steps.txt": ["# delay-steps: unchanged: no part looks ahead", *graph],
        "024-thread-state.txt": [
            f"# thread-state: refused: thread state: {NO_TIME}",
            *graph,
        ],
        "025-write-out-attention.txt": ["# write-out-attention: unchanged: no attention is computed", *graph],
        "026-write-out-for-onnx.txt": [
            "# write-out-for-onnx: unchanged: torch's exporter writes all operators as they are",
            *graph,
        ],
        "027-folds-as-modules.txt": [
            "# folds-as-modules: unchanged: nothing is folded over all numbers so far",
            *graph,
        ],
        "028-memories-as-modules.txt": [
            "# memories-as-modules: unchanged: the graph has no recurrence of matrices",
            *graph,
        ],
        "029-flatten-outputs.txt": ["# flatten-outputs: modified", *graph[:-1], "return (linear_2,)"],
        "030-cells-as-modules.txt": [
            "# cells-as-modules: unchanged: the graph has no recurrent operator",
            *graph[:-1],
            "return (linear_2,)",
        ],
    }


def test_a_folder_that_can_not_be_written_costs_no_conversion(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(WriteError, match=r"can't write dump_graphs=.*taken: "):
        convert(tmp_path / "taken")
    result = CliRunner().invoke(
        app,
        [
            "convert",
            "tests.test_dump_graphs:Toy",
            "--out",
            str(tmp_path / "out"),
            "--dump-graphs",
            str(tmp_path / "taken"),
        ],
    )
    assert result.exit_code == 2
    assert "--dump-graphs" in result.output
    assert "expected a folder, found a file" in " ".join(result.output.split())


def toy() -> nn.Module:
    return seeded(Toy)


def batches() -> list[torch.Tensor]:
    return [vectors(8, 4, seed=i) for i in range(3)]


def test_the_command_line_takes_the_folder(tmp_path):
    here = "tests.test_dump_graphs"
    out, graphs = tmp_path / "out", tmp_path / "graphs"
    result = CliRunner().invoke(
        app,
        [
            *("convert", f"{here}:toy", "--data", f"{here}:batches", "--target", "linear", "--recipe", "fast"),
            *("--parts", "first", "--parts", "second", "--out", str(out), "--dump-graphs", str(graphs), "--quiet"),
        ],
    )
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in graphs.iterdir())
    assert names[0] == "000-capture.txt"
    assert names[10:] == ["010-substitute-first.txt", "011-substitute-second.txt", "012-bound-positions.txt"]
