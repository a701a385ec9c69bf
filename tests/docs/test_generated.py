"""The generated pages are what the registries say today, whole, and readable as Markdown."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import thesean
from thesean.targets import get_family

ROOT = Path(__file__).resolve().parents[2]


def load_generator() -> ModuleType:
    """docs/generate.py as a module: docs/ is a folder of text, not a package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


@pytest.mark.parametrize("name", list(generate.PAGES))
def test_a_page_is_up_to_date(name: str):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == generate.PAGES[name]() + "\n", "run python docs/generate.py"


def test_every_target_is_there_with_every_option():
    page = generate.targets_page()
    files = (path.stem for path in (ROOT / "thesean" / "targets").glob("*.py"))
    names = {stem.replace("_", "-") for stem in files if stem != "__init__"}  # other tests register more than files do
    assert set(re.findall(r"^## (\S+)$", page, re.MULTILINE)) == names
    for name in names:
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for option in get_family(name).options.model_fields:
            assert f"| `{option}` |" in section


def test_every_measure_is_there():
    assert set(re.findall(r"^## (\S+)$", generate.measures_page(), re.MULTILINE)) == set(thesean.measures())


@pytest.mark.parametrize("make", list(generate.PAGES.values()), ids=list(generate.PAGES))
def test_every_row_of_a_table_has_as_many_cells_as_its_head(make):
    tables = re.findall(r"(?:^\|.*\|$\n?)+", make(), re.MULTILINE)
    assert tables
    for table in tables:
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table


def test_a_state_is_that_of_the_module_that_is_built():
    # 4 heads of 64: 128 features of a key, and the sum of weights beside 64 values
    assert generate.state_of(get_family("linear-attention")) == "4 x 128 x 65"
    assert generate.state_of(get_family("lstm")) == "512"
    assert generate.state_of(get_family("mixer")) == "none"
    # keys, values, and when each came and what it scores, of 64 tokens, 4 first ones and one place that counts nothing
    assert generate.state_of(get_family("sliding")) == "4 x 69 x 64, 4 x 69 x 64, 4 x 2 x 69 and a count"


def test_checking_writes_nothing_and_tells_what_is_stale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "targets.md, measures.md" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert generate.main([]) == 0
    assert capsys.readouterr().out == "wrote targets.md, measures.md, scaling.md\n"
    assert generate.main(["--check"]) == 0
