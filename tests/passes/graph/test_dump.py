from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tests import captured
from tests.captured import traced
from tests.models import vectors
from thesean.errors import PassRefused, WriteError
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.functionalise import Functionalise
from thesean.passes.graph.dump import dump, dumping, not_dumping
from thesean.passes.graph.text import text
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.passes.simplify import Simplify


@pytest.fixture
def relu() -> fx.GraphModule:
    return traced(nn.ReLU(), vectors(2, 3))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_pass_tells_what_it_left_and_what_became_of_it(tmp_path, relu):
    with dumping(tmp_path / "new" / "graphs"):
        Functionalise()(relu)
        with pytest.raises(PassRefused):
            BoundPositions("cut")(relu)  # type: ignore[arg-type]
    files = {p.name: p.read_text() for p in (tmp_path / "new" / "graphs").iterdir()}
    graph = "input_1 = placeholder input\nrelu = aten.relu.default(input_1)\nreturn (relu,)\n"
    assert files == {
        "000-functionalise.txt": f"# functionalise: unchanged: no operator writes into its input\n{graph}",
        "001-bound-positions.txt": "# bound-positions: refused: bound positions: expected one of clamp, wrap, drop, "
        f"refuse, found 'cut'.\n{graph}",
    }


def test_outside_nothing_is_written(tmp_path, relu):
    with dumping(tmp_path):
        pass
    Simplify()(relu)
    with dumping(None):
        Simplify()(relu)
    assert names(tmp_path) == []


def test_trials_inside_can_be_left_out(tmp_path, relu):
    with dumping(tmp_path):
        with not_dumping():
            Simplify()(relu)
        Functionalise()(relu)
    assert names(tmp_path) == ["000-functionalise.txt"]


def test_a_second_story_goes_on_behind_the_first_and_overwrites_nothing(tmp_path, relu):
    for step in ("first", "second"):
        with dumping(tmp_path):
            dump(step, relu, "told")
    assert names(tmp_path) == ["000-first.txt", "001-second.txt"]
    (tmp_path / "1041-long.txt").touch()
    (tmp_path / "7000-notes.md").touch()
    with dumping(tmp_path):
        dump("third", relu, "told")
    assert (tmp_path / "1042-third.txt").exists()
    assert (tmp_path / "000-first.txt").read_text().startswith("# first: told\n")


def test_two_at_once_write_each_their_own(tmp_path, relu):
    def other() -> None:
        dump("unheard", relu, "told")  # a new thread begins with no dump
        with dumping(tmp_path / "b"):
            started.set()
            dump("b", relu, "told")

    started = threading.Event()
    thread = threading.Thread(target=other)
    with dumping(tmp_path / "a"):
        thread.start()
        assert started.wait(60)
        dump("a", relu, "told")
        thread.join()
    assert names(tmp_path / "a") == ["000-a.txt"]
    assert names(tmp_path / "b") == ["000-b.txt"]


def test_a_folder_that_can_not_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    told = pytest.raises(WriteError, match=r"can't write dump_graphs=.*file: .*Choose a writable folder")
    with told, dumping(tmp_path / "file"):
        pytest.fail("reached")


def test_a_folder_that_is_gone_meanwhile_costs_no_conversion(tmp_path, relu):
    with dumping(tmp_path / "graphs"):
        (tmp_path / "graphs").rmdir()
        with pytest.warns(UserWarning, match="dump_graphs ends here: can't write .*: No such file"):
            dump("late", relu, "told")
        dump("later", relu, "told")  # once is enough


def test_a_part_is_a_file_and_its_name_is_one_that_any_file_system_takes(tmp_path, relu):
    with dumping(tmp_path):
        dump("remove", relu, "told", part="a.b#2..c/../d e" + "x" * 300)
    (name,) = names(tmp_path)
    assert name.startswith("000-remove-a.b-2..c-..-d-exxx")
    assert len(name) < 120


def test_a_hybrid_is_told_part_by_part_without_what_nothing_reads_any_more(tmp_path):
    guide = captured.mlp()
    bound_plan = make_plan(guide, {"0..1": "mlp", "4..5": "identity", "*": "keep"})
    torch.manual_seed(0)
    with dumping(tmp_path):
        hybrid = build_hybrid(bound_plan)
    files = [p.read_text().splitlines() for p in sorted(tmp_path.iterdir())]
    paths = [p.path for p in bound_plan.plan.replaced]
    assert [f[0] for f in files] == [f"# substitute {paths[0]}: modified", f"# remove {paths[1]}: modified"]
    assert files[-1][1:] == text(hybrid.graph_module.graph)
    assert len(files[0]) < len(text(guide.graph_module.graph))
