"""Families that other distributions install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thesean.targets import get_family, targets
from thesean.targets.shared import registry

MODULE = """
import dataclasses

from thesean.targets import get_family, register

TARGET = dataclasses.replace(get_family("linear"), name="{name}", summary="installed")
register(TARGET)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a distribution with one module and one entry point on the path; the registry is discovered anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_families", {})
    monkeypatch.setattr(registry, "_discovered", False)

    def make(distribution: str, module: str, source: str, value: str = "TARGET") -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[thesean.targets]\n{module} = {module}:{value}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def test_an_installed_family_is_listed_beside_the_built_in_ones(install):
    install("their-targets", "their_target", MODULE.format(name="theirs"))
    assert targets()["theirs"] == "installed"
    assert get_family("theirs").scope == "part"
    assert {"gru", "mlp", "linear"} <= targets().keys()


@pytest.mark.parametrize(
    ("source", "value", "problem"),
    [
        ("import package_that_is_nowhere", "TARGET", "ModuleNotFoundError: No module named 'package_that_is_nowhere'"),
        ("TARGET = 3", "TARGET", "TypeError: expected a thesean.targets.Family, found int"),
        ("", "TARGET", "AttributeError: .*TARGET"),
        ("raise RuntimeError('no licence')", "TARGET", "RuntimeError: no licence"),
    ],
    ids=["missing package", "no family", "no attribute", "raises"],
)
def test_a_broken_one_is_a_warning_that_names_its_distribution_and_the_others_load(install, source, value, problem):
    install("broken-targets", "broken_target", source, value)
    install("their-targets", "their_target", MODULE.format(name="theirs"))
    with pytest.warns(UserWarning, match=rf"^broken-targets: .*\(broken_target:TARGET\) is left out: {problem}"):
        known = targets()
    assert {"theirs", "gru"} <= known.keys()
    assert targets() == known  # and is told once


def test_a_built_in_name_is_refused_and_keeps_its_family(install):
    source = MODULE.replace("register(TARGET)", "").format(name="gru")
    install("greedy-targets", "greedy_target", source)
    with pytest.warns(UserWarning, match=r"^greedy-targets: .*'gru' is already registered.*uninstall greedy-targets"):
        summary = targets()["gru"]
    assert summary != "installed"
