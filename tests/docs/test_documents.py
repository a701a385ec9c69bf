"""What a reader meets: short pages, links that lead somewhere, words that the code still has."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import thesean
from thesean.passes.graph.signature import Bound, InputSpec, Origin
from thesean.passes.plan.rows import PlanLatency, PlannedPart, PlanRows, ProbedCandidate
from thesean.recipe import Alignment, ClosedForm, FineTuning, Recipe
from thesean.report.conversion import ConversionReport, StageRow
from thesean.report.table import Row

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(document: Path) -> str:
    return _FENCED.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """The headings as links name them: lower case, without punctuation, dashes for spaces."""
    heads = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_is_short_and_has_one_table_of_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 8000
    assert re.findall(r"<!-- table:([\w-]+) -->", text) == ["smollm"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(document: Path):
    for link in _LINK.findall(prose(document)):
        path, _, anchor = link.partition("#")
        assert "://" not in path, f"{link}: say its number or its name"
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), link
        assert found.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(found), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_of_the_package_that_a_document_names_exist(document: Path):
    for name in re.findall(r"\b(?:thesean|benchmarks|examples|tests|docs)/[\w/.-]*\w", document.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def test_the_guide_begins_with_links_to_all_its_sections_in_order():
    text = prose(ROOT / "docs" / "guide.md")
    linked = re.findall(r"\[([^\]]*)\]\(#", text.split("\n## ")[0])
    assert linked == re.findall(r"^## (.+)$", text, re.MULTILINE)


def test_the_guide_tells_of_every_public_name():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert not [name for name in thesean.__all__ if not re.search(rf"\bthesean\.{name}\b", text)]


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index


@pytest.mark.parametrize(
    ("heading", "kinds"),
    [
        ("graph.json", (InputSpec, Bound, Origin)),
        ("plan.yaml", (PlanRows, PlannedPart, PlanLatency, ProbedCandidate)),
        ("recipe.yaml", (Recipe, ClosedForm, Alignment, FineTuning)),
        ("report.json of a conversion", (ConversionReport, StageRow)),
        ("report.json of a comparison", (Row,)),
    ],
)
def test_the_formats_page_names_every_field(heading: str, kinds: tuple[Any, ...]):
    section = prose(ROOT / "docs" / "formats.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for kind in kinds:
        names = kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in fields(kind)]
        for name in names:
            assert f"`{name}`" in section, f"{kind.__name__}.{name}"


def test_the_formats_page_names_every_key_that_earlier_versions_and_this_one_wrote(tmp_path: Path):
    section = prose(ROOT / "docs" / "formats.md").split("\n## graph.json\n")[1].split("\n## ")[0]
    documents = sorted((ROOT / "tests" / "formats").rglob("graph.json"))
    assert documents
    loaded = thesean.load(documents[0].parent)
    next(iter(loaded.module.parameters())).requires_grad_(False)  # what is frozen is named
    documents.append(loaded.save(tmp_path / "again") / "graph.json")
    for document in documents:
        told = json.loads(document.read_text(encoding="utf-8"))
        keys = {*told, *told["signature"], *(key for node in told["nodes"] for key in node)}
        assert not [key for key in sorted(keys) if f"`{key}`" not in section], document


def test_the_formats_page_tells_every_default_of_a_recipe():
    section = prose(ROOT / "docs" / "formats.md").split("\n## recipe.yaml\n")[1].split("\n## ")[0]
    for kind in (Recipe, ClosedForm, Alignment, FineTuning):
        for name, field in kind.model_fields.items():
            value = field.default
            told = (
                str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
            )
            assert f"| `{name}` | {'' if isinstance(value, BaseModel) else f'{told} '}|" in section


def test_the_formats_page_names_every_key_of_a_files_metadata():
    section = prose(ROOT / "docs" / "formats.md").split("\n## ONNX\n")[1].split("\n## ")[0]
    deploy = "\n".join(p.read_text("utf-8") for p in (ROOT / "thesean" / "deploy").rglob("*.py"))
    keys = set(re.findall(r'^[A-Z_, ]+ = .*"thesean\.\w+".*$', deploy, re.MULTILINE))
    names = {name for line in keys for name in re.findall(r'"(thesean\.\w+)"', line)}
    assert {"thesean.states", "thesean.plan", "thesean.quantized", "thesean.weights_sha256"} <= names
    assert not [name for name in sorted(names) if f"`{name}`" not in section]


def test_the_architecture_page_names_every_folder_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = (p for p in (ROOT / "thesean").rglob("*") if p.is_dir() and p.name != "__pycache__")
    for folder in folders:
        assert f"{folder.relative_to(ROOT)}/" in text


def test_the_architecture_page_names_every_file_at_the_top_of_the_package():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## The tree\n")[1].split("\n## ")[0]
    names = {path.name for path in (ROOT / "thesean").glob("*.py")} - {"__init__.py"}
    assert not names - set(re.findall(r"\w+\.py", tree))


def test_the_architecture_page_has_the_layers_that_are_checked():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## The layers\n")[1]
    (block,) = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    told, rooms = block.split("\n\npasses: ")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, of_passes = (c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    assert [" ".join(level.split()) for level in told.split(">")] == [level.replace("thesean.", "") for level in layers]
    found = [level.strip() for level in rooms.split(">") if level.strip() not in ("each pass", "base")]
    assert found == [name.removeprefix("thesean.passes.") for name in of_passes if not name.endswith(".base")]
