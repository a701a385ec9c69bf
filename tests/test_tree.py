"""The tree keeps its rule: a file directly in targets/, similarity/, passes/ or kernels/ is one of them, and a folder
inside holds what they share. Read from the sources, lazy and TYPE_CHECKING imports counted.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from thesean.cli.app import app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "thesean"
LONGEST = 400  # lines; a file past it is two ideas
MOST = 8  # parameters

# What a user calls names everything that can be said; the rest takes what belongs together in one piece.
EXPLICIT = {
    "thesean.compiler.compile",
    "thesean.compiler.baseline",
    "thesean.compiler.plan",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package by the name of its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """What a module imports of the package, wherever in it the import stands."""
    for node in ast.walk(tree(modules()[module])):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from {whole if whole in modules() else str(node.module)} & modules().keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules().keys()


def beside(room: str) -> list[Path]:
    """The files that stand directly in a room, without its front door and its base class."""
    return [p for p in sorted((PACKAGE / room).glob("*.py")) if p.stem not in ("__init__", "base")]


def assigned(path: Path, name: str) -> int:
    """How often the module's own level assigns the name."""
    return sum(
        isinstance(target, ast.Name) and target.id == name
        for node in tree(path).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    )


@pytest.mark.parametrize(("room", "name"), [("targets", "TARGET"), ("similarity", "MEASURE")])
def test_a_file_beside_shared_defines_one_target_or_one_measure(room, name):
    assert {path.name: assigned(path, name) for path in beside(room)} == {path.name: 1 for path in beside(room)}


def passes_in(path: Path) -> list[str]:
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
    return [c.name for c in classes if any(isinstance(b, ast.Name) and b.id == "Pass" for b in c.bases)]


def test_a_file_beside_the_rooms_of_the_passes_defines_one_pass_of_its_name():
    for path in beside("passes"):
        assert [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in passes_in(path)] == [path.stem]


def test_a_file_beside_shared_defines_one_kernel_of_its_name():
    for path in beside("kernels"):
        functions = {node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)}
        operation = path.stem.removesuffix("_triton")
        assert operation in functions, f"{path.name}: expected a function {operation}"
    names = {path.stem for path in beside("kernels")}
    alone = {name for name in names if name.endswith("_triton") and name.removesuffix("_triton") not in names}
    assert not alone


def test_the_rooms_below_import_no_pass_and_no_pass_imports_another():
    passes = {f"thesean.passes.{path.stem}" for path in beside("passes")}
    ground = ("thesean.passes.base", "thesean.errors", "thesean.recipe")
    allowed = ("thesean.passes.analyse.", "thesean.passes.graph.", "thesean.targets", "thesean.kernels.")
    for module in modules():
        if module.startswith(("thesean.passes.analyse.", "thesean.passes.graph.")):
            assert not passes & set(imports(module)), module
        elif module in passes:
            strange = [name for name in imports(module) if not name.startswith(allowed) and name not in ground]
            assert not strange, f"{module} imports {strange}"


def test_no_target_and_no_measure_imports_another():
    for room in ("targets", "similarity"):
        own = {f"thesean.{room}.{path.stem}" for path in beside(room)}
        assert not [(module, name) for module in sorted(own) for name in imports(module) if name in own]


def test_a_kernel_imports_none_but_the_reference_that_it_stands_beside():
    own = {f"thesean.kernels.{path.stem}" for path in beside("kernels")}
    allowed = {name: {name.removesuffix("_triton")} for name in own}
    assert not [(name, other) for name in sorted(own) for other in set(imports(name)) & own - allowed[name]]


def test_there_is_no_import_circle():
    graph = nx.DiGraph((module, name) for module in modules() for name in imports(module))
    assert graph.has_edge("thesean.converted", "thesean.deploy.export_report")  # under TYPE_CHECKING
    assert graph.has_edge("thesean.compiler", "thesean.passes.capture.capture")
    circles = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    assert not circles


def calls(path: Path) -> set[str]:
    found = (node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call))
    return {f.id for f in found if isinstance(f, ast.Name)}


def test_each_pass_has_a_test_of_its_name_with_a_golden_and_a_reason():
    tests = {path.stem: ROOT / "tests" / "passes" / f"test_{path.stem}.py" for path in beside("passes")}
    assert not [name for name, path in tests.items() if not path.exists()]
    wanted = re.compile(r"\.reason\b|PassRefused|applies_everywhere=True")
    reasons = [name for name, path in tests.items() if not wanted.search(path.read_text(encoding="utf-8"))]
    assert not reasons, f"{reasons}: expected a test of the reason why the pass did not apply"
    goldens = [name for name, path in tests.items() if "text" not in calls(path)]
    assert not goldens, f"{goldens}: expected the graph before and after, as text(graph)"


def test_no_file_is_longer_than_one_idea():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    assert not {module: count for module, count in lines.items() if count > LONGEST}


def test_each_module_at_the_top_stands_in_a_layer():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if "thesean.cli" in c.get("layers", ()))
    standing = [name for layer in layers for name in re.split(r"\s*[|:]\s*", layer)]
    tops = {name for name in modules() if name.count(".") == 1} | {"thesean.passes", "thesean.kernels"}
    assert len(standing) == len(set(standing))
    assert set(standing) == tops


def wide_functions() -> Iterator[str]:
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue  # a kernel takes pointers and strides one by one
            if module.startswith("thesean.cli.") and node.name in commands:
                continue  # an option each
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len(given) - (given[:1] in (["self"], ["cls"])) > MOST:
                yield f"{module}.{node.name}"


def test_no_function_takes_more_than_eight_parameters_but_those_that_make_a_request():
    assert set(wide_functions()) == EXPLICIT


def test_the_package_that_is_tested_is_the_one_that_is_read():
    assert Path(str(importlib.import_module("thesean").__file__)).parent == PACKAGE
