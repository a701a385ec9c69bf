"""CONTRIBUTING.md does what it says: its files are written into rooms beside the package's own, and found there; the
contracts hold for them, a small guide is compiled with them and its file runs in onnxruntime.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from benchmarks.suite import Options, run_case
from benchmarks.tables import list_of
from docs import generate
from tests import models
from tests.passes.contract import check_pass
from tests.similarity.contract import check_measure
from tests.targets.contract import PARTS, check_family, check_onnx, fits, sequence, stateful_modules
from thesean.passes.capture import capture
from thesean.similarity import get_measure
from thesean.similarity.shared import registry as of_measures
from thesean.targets import get_family
from thesean.targets.shared import registry as of_targets

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# `path`: and then a block
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
NAMES = ("glu", "moving-average")
TESTS = [name for name in FILES if name.startswith("tests/")]
ROOMS = ["thesean.targets", "thesean.similarity", "thesean.passes", "thesean.kernels", "thesean.deploy.lowering.forms"]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of CONTRIBUTING, found in their rooms; afterwards nothing of them is left."""
    folder = tmp_path_factory.mktemp("contribution")
    for name, source in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    before = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for room in ROOMS:
            package = importlib.import_module(room)
            patch.setattr(package, "__path__", [*package.__path__, str(folder / room.replace(".", "/"))])
        rediscover(patch)
        yield folder
    for name in sys.modules.keys() - before.keys():
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            room, _, file = name.rpartition(".")
            if hasattr(sys.modules.get(room), file):
                delattr(sys.modules[room], file)
            del sys.modules[name]


def rediscover(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(of_targets, "_families", {})
    patch.setattr(of_targets, "_discovered", False)
    patch.setattr(of_measures, "_measures", {})
    patch.setattr(of_measures, "_discovered", False)


def load(folder: Path, name: str) -> ModuleType:
    """A file that stands in no package."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, folder / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_to_contribute_has_its_file():
    for start in ("targets/glu", "similarity/", "passes/", "kernels/", "deploy/lowering/forms/", "targets/moving"):
        assert [name for name in FILES if name.startswith(f"thesean/{start}")], start
    assert len(TESTS) == 4
    for section in TEXT.split("\n## ")[2:]:
        words = re.sub(r"```.*?```", "", section, flags=re.DOTALL).split()
        assert len(words) < 400, f"{section.splitlines()[0]}: more than a page"


def test_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"^make ([\w-]+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_programs_that_it_starts_are_installed_by_make_or_by_the_line_itself():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {re.split(r"[<>=;\[ ]", row)[0] for row in project["optional-dependencies"]["dev"]} | {"python"}
    (block,) = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    found = [(line, name) for line in block.splitlines() for name in re.findall(r"\.venv/bin/([\w-]+)", line)]
    assert {"python", "pre-commit"} <= {name for _, name in found}
    assert not [name for line, name in found if name not in brought and f"pip install {name}" not in line]


def test_paths_that_are_told_are_there():
    told = set(re.findall(r"`((?:tests|benchmarks|thesean)/[\w./]+)`", TEXT)) - FILES.keys()
    told = {path for path in told if "x.py" not in path.split("_")[-1].split("/")[-1:]}  # x: whatever is added
    assert {"tests/targets/contract.py", "tests/test_tree.py"} <= told
    assert not [path for path in told if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", TESTS)
def test_the_tests_of_the_examples_pass(name, folder):
    found = {key: value for key, value in vars(load(folder, name)).items() if key.startswith("test_")}
    assert found
    for test in found.values():
        test()


@pytest.mark.thorough
def test_the_targets_keep_the_contract_on_every_part_that_they_take(folder):
    taken = {name: [k for k, part in PARTS.items() if fits(get_family(name), part)] for name in NAMES}
    assert all("causal" in kinds and "token-wise" in kinds for kinds in taken.values())
    for name, kinds in taken.items():
        for kind in kinds:
            check_family(get_family(name), PARTS[kind])


@pytest.mark.thorough
def test_the_core_is_lowered_by_the_file_of_its_name(folder):
    assert "moving-average" in stateful_modules()
    check_onnx(get_family("moving-average"), sequence(), folder)
    import onnx

    found = [node.op_type for node in onnx.load(folder / "moving-average.onnx").graph.node]
    assert found.count("Scan") == 1


def test_the_measure_keeps_the_contract(folder):
    check_measure(get_measure("huber"))


def test_the_pass_keeps_the_contract(folder):
    example = load(folder, "tests/passes/test_cancel_negations.py").example()
    result = check_pass(example.a_pass, example.graph_module, example.inputs)
    assert result.modified


def test_the_pages_and_the_list_take_them_in_by_the_commands_that_are_told(folder):
    assert ".venv/bin/python docs/generate.py" in TEXT
    assert ".venv/bin/python -m benchmarks --readme" in TEXT
    page = generate.PAGES["targets.md"]()
    assert all(f"\n## {name}\n" in page for name in NAMES)
    assert "\n## huber\n" in generate.PAGES["measures.md"]()
    case = load(folder, "benchmarks/moving_average.py").CASE
    assert f"| {case.question} |" in list_of({"moving_average": case})


def test_the_benchmark_runs_in_its_quick_form(folder, tmp_path):
    case = load(folder, "benchmarks/moving_average.py").CASE
    result, faults = run_case("moving_average", case, Options(out=tmp_path, quick=True))
    assert [row["name"] for row in result["cases"]] == ["width 8"]
    assert not faults


class Undone(nn.Module):
    """A language model whose logits are negated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.network = models.gpt2(layers=1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.network(input_ids=input_ids).logits.neg().neg()


@pytest.mark.thorough
def test_a_guide_is_compiled_with_them_saved_loaded_and_exported(folder, tmp_path, monkeypatch):
    a_pass = load(folder, "thesean/passes/cancel_negations.py").CancelNegations()
    monkeypatch.setattr(capture, "CANONICAL", (*capture.CANONICAL, a_pass))  # the list that CONTRIBUTING names
    guide = Undone()
    ids = models.tokens(3, 12)
    recipe: dict[str, Any] = {"steps": 20, "alignment": {"measure": "huber", "share": 0.5}}
    converted = thesean.compile(
        guide,
        {"*.attn": "moving-average", "*.mlp": "glu"},
        data=models.token_batches(),
        recipe=recipe,
        granularity="sublayer",
        progress=False,
        dump_graphs=tmp_path / "graphs",
    )
    assert [part.target for part in converted.plan] == ["moving-average", "glu"]
    before, after = (
        (tmp_path / "graphs" / f"{name}.txt").read_text()
        for name in ("009-latents-side-by-side", "010-cancel-negations")
    )
    assert (before.count("aten.neg"), after.count("aten.neg")) == (2, 0)
    assert after.startswith("# cancel-negations: modified")
    expected = converted(ids)
    converted.save(tmp_path / "saved")
    again = thesean.load(tmp_path / "saved")
    torch.testing.assert_close(again(ids), expected, rtol=0, atol=0)

    from thesean.deploy.session import Session

    report = converted.export(tmp_path / "model.onnx")
    assert report.stateful
    outputs, _ = Session(report.path).run({"input_ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs["output"]), expected, rtol=1e-4, atol=1e-5)


def test_installed_in_a_package_of_ones_own_they_are_known_too(folder, tmp_path, monkeypatch):
    groups = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]
    package = tmp_path / "my_package"
    package.mkdir()
    for name in ("targets/glu", "similarity/huber"):
        (package / f"{Path(name).name}.py").write_text(FILES[f"thesean/{name}.py"], encoding="utf-8")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = []
    for group, names in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    for room in ROOMS:  # as an installed Thesean is, without the contribution in it
        module = importlib.import_module(room)
        monkeypatch.setattr(module, "__path__", list(module.__path__)[:-1])
    rediscover(monkeypatch)
    assert get_family("glu").module.__module__ == "my_package.glu"
    assert get_measure("huber").summary.startswith("Huber distance")
    assert "moving-average" not in thesean.targets()
