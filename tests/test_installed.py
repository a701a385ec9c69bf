"""Targets and measures that other distributions install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import thesean
from thesean.similarity import get_measure
from thesean.similarity.shared import registry as of_measures
from thesean.targets import get_family
from thesean.targets.shared import registry as of_targets

# of each kind: a module that registers itself when it is imported, and an object whose name is taken
TARGET = """
import dataclasses

from thesean.targets import get_family, register

TARGET = dataclasses.replace(get_family("linear"), name="theirs", summary="installed")
register(TARGET)
"""
MEASURE = """
from thesean.similarity import Measure, register

MEASURE = Measure(name="theirs", summary="installed", value=lambda x, y: (x - y).abs().max())
register(MEASURE)
"""
TAKEN = {
    "TARGET": TARGET.replace("register(TARGET)", "").replace('"theirs"', '"gru"'),
    "MEASURE": MEASURE.replace("register(MEASURE)", "").replace('"theirs"', '"cka"'),
}
SOURCES = {"TARGET": TARGET, "MEASURE": MEASURE}
KINDS = pytest.mark.parametrize("kind", SOURCES)


def known(kind: str) -> Any:
    return thesean.targets() if kind == "TARGET" else thesean.measures()


def summary(kind: str, name: str) -> str:
    return (get_family(name) if kind == "TARGET" else get_measure(name)).summary


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a distribution with one module and one entry point on the path; the registries are discovered anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(of_targets, "_families", {})
    monkeypatch.setattr(of_targets, "_discovered", False)
    monkeypatch.setattr(of_measures, "_measures", {})
    monkeypatch.setattr(of_measures, "_discovered", False)

    def make(kind: str, distribution: str, module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[thesean.{kind.lower()}s]\n{module} = {module}:{kind}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


@KINDS
def test_an_installed_one_is_listed_beside_the_built_in_ones(kind, install):
    install(kind, "theirs", "their_module", SOURCES[kind])
    assert summary(kind, "theirs") == "installed"
    assert {"theirs", "gru" if kind == "TARGET" else "cka"} <= set(known(kind))


@KINDS
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import package_that_is_nowhere", "ModuleNotFoundError: No module named 'package_that_is_nowhere'"),
        ("TARGET = MEASURE = 3", "TypeError: expected a (Family|Measure), found int"),
        ("", "AttributeError: .*(TARGET|MEASURE)"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    ],
    ids=["missing package", "another object", "no attribute", "raises"],
)
def test_a_broken_one_is_a_warning_that_names_its_distribution_and_the_others_load(kind, install, source, problem):
    install(kind, "broken", "broken_module", source)
    install(kind, "theirs", "their_module", SOURCES[kind])
    found = rf"^broken: the {kind.lower()} 'broken_module' \(broken_module:{kind}\) is left out: {problem}"
    with pytest.warns(UserWarning, match=found):
        names = known(kind)
    assert {"theirs", "gru" if kind == "TARGET" else "cka"} <= set(names)
    assert known(kind) == names  # and is told once


@pytest.mark.parametrize(("kind", "name"), [("TARGET", "gru"), ("MEASURE", "cka")])
def test_a_built_in_name_is_refused_and_keeps_its_own(kind, name, install):
    install(kind, "greedy", "greedy_module", TAKEN[kind])
    with pytest.warns(UserWarning, match=rf"^greedy: .*'{name}' is already registered.*uninstall greedy"):
        known(kind)
    assert summary(kind, name) != "installed"
