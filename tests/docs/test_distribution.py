"""What people are told to install is what pyproject.toml offers."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thesean.errors import DISTRIBUTION, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py")])
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]

# pip install '.[onnx,hf]', pip install -e .[hf], pip install "name[extra]"; options and the requirement
INSTALL = re.compile(r"pip install((?: --?[\w-]+)*) ['\"]?([\w.-]+)\[([\w,-]+)\]")


def names_of(requirement: str) -> tuple[str, tuple[str, ...]]:
    """ "thesean-compiler[onnx,hf]>=1" -> ("thesean-compiler", ("onnx", "hf"))."""
    found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement)
    assert found is not None, requirement
    return found[1], tuple(found[2].split(",")) if found[2] else ()


def packages_of(extra: str) -> set[str]:
    """What an extra installs, other extras of ours followed."""
    packages = set()
    for requirement in EXTRAS[extra]:
        name, extras = names_of(requirement)
        packages |= {name} if name != DISTRIBUTION else set().union(*map(packages_of, extras))
    return packages


def missing_extras() -> Iterator[tuple[Path, ast.Call]]:
    """Every MissingExtraError that the package raises."""
    for path in sorted((ROOT / "thesean").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MissingExtraError":
                yield path, node


def test_the_distribution_has_one_name_and_one_version():
    assert PROJECT["project"]["name"] == DISTRIBUTION
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "thesean.__version__"}
    assert PROJECT["project"]["scripts"] == {"thesean": "thesean.cli:app"}


def test_what_a_package_reads_is_in_the_wheel():
    globs = PROJECT["tool"]["setuptools"]["package-data"]["thesean"]
    packed = {path for glob in globs for path in (ROOT / "thesean").glob(glob)}
    files = {path for path in (ROOT / "thesean").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} == packed


def test_extras_that_name_other_extras_name_our_own():
    for extra in EXTRAS:
        for requirement in EXTRAS[extra]:
            name, wanted = names_of(requirement)
            assert name != "thesean", "on the package index that is another project"
            assert name != DISTRIBUTION or set(wanted) <= EXTRAS.keys()


def test_a_hint_names_the_distribution():
    assert str(MissingExtraError("onnx", "onnx")).endswith(f"pip install '{DISTRIBUTION}[onnx]'")


def test_every_hint_names_an_extra_that_brings_the_package():
    calls = list(missing_extras())
    assert len(calls) > 3
    for path, call in calls:
        package, extra = call.args
        assert isinstance(extra, ast.Constant), f"{path}:{call.lineno}: the extra is not written out"
        assert extra.value in EXTRAS, f"{path}:{call.lineno}: there is no extra {extra.value!r}"
        if isinstance(package, ast.Constant):
            assert package.value in packages_of(str(extra.value)), f"{path}:{call.lineno}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_document_installs_this_project_and_extras_that_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    assert "pip install thesean" not in text.replace(f"pip install {DISTRIBUTION}", "")
    assert "thesean[" not in text
    for _, name, extras in INSTALL.findall(text):
        assert name in (".", DISTRIBUTION)
        assert set(extras.split(",")) <= EXTRAS.keys()


def test_the_readme_says_how_to_install():
    assert INSTALL.search((ROOT / "README.md").read_text(encoding="utf-8")) is not None
