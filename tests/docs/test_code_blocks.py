"""What the documents show runs: Python blocks in order, commands through the command line's own parser."""

from __future__ import annotations

import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import thesean
from tests.docs import my_models
from thesean.cli.app import app
from thesean.recipe import RECIPES
from thesean.targets.shared import registry

pytest.importorskip("matplotlib")
pytest.importorskip("onnxruntime")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]

# Minutes of measuring, and exports: these are parsed, and the command line's own tests run them
_LONG = ("--context", "auto", "export", "bench")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of the code's first line in its document


def blocks_of(text: str) -> list[Block]:
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2))) for m in _BLOCK.finditer(text)]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command, lines that end in a backslash joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_python(block: Block, document: Path, namespace: dict[str, Any]) -> None:
    """With the document's own line numbers, so that a traceback leads there."""
    exec(compile("\n" * block.line + block.code, str(document), "exec"), namespace)


def check_command(words: list[str]) -> None:
    """The command line would take it."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    group.commands[words[0]].make_context(words[0], words[1:])


def parse_by_lm_eval(words: list[str]) -> None:
    """lm-eval would take it."""
    if find_spec("lm_eval") is not None:
        from lm_eval._cli import HarnessCLI

        with mock.patch.object(sys, "argv", ["lm_eval", *words]):
            HarnessCLI().parse_args()


def run_command(words: list[str]) -> None:
    """A command of ours runs, or is parsed where running it takes long; others must at least be there."""
    program, *rest = words
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {rest[0]}"
    elif program == "thesean":
        if any(word in rest for word in _LONG):
            check_command(rest)
            return
        result = CliRunner().invoke(app, rest, env={"COLUMNS": "100", "NO_COLOR": "1"})
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
    elif program in ("torchrun", "accelerate"):  # see test_ranks.py
        check_command(rest[rest.index("thesean") + 1 :])
    elif program == "lm_eval":  # see hf/test_lm_eval.py
        parse_by_lm_eval(rest)
    elif words[:3] == ["python", "-m", "thesean.hf.lm_eval"]:
        parse_by_lm_eval(words[3:])
    else:
        assert program == "pip", f"{shlex.join(words)}: say here how to check it"  # see test_distribution.py


def run_document(document: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {
        "__name__": "document",
        "torch": torch,
        "model": my_models.guide(),
        "batches": my_models.batches(),
        "held_out": my_models.batches(2, seed=2),
        "convnet": my_models.convnet(),
        "images": my_models.images(),
    }
    for block in blocks_of(document.read_text(encoding="utf-8")):
        if block.language == "python":
            run_python(block, document, namespace)
        elif block.language == "sh":
            for words in commands_of(block):
                run_command(words)
    return namespace


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with my_models in it, where the default recipe takes a few steps and families don't stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "my_models", my_models)
    for name in ("default", "paper"):
        monkeypatch.setitem(RECIPES, name, RECIPES[name].model_copy(update={"steps": 4}))
    thesean.targets()  # discovered before the copy
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    return tmp_path


def check_readme(namespace: dict[str, Any], folder: Path) -> None:
    assert (folder / "model.onnx").stat().st_size > 0
    assert thesean.load("converted").plan == namespace["converted"].plan


def check_guide(namespace: dict[str, Any], folder: Path) -> None:
    """What the numpy block decodes is what torch decodes, the whole sequence read again for each token."""
    ids = [[3, 1, 4, 1, 5]]
    for _ in range(20):
        logits_BTV = namespace["converted"](input_ids=torch.tensor(ids)).logits
        ids[0].append(int(logits_BTV[0, -1].argmax()))
    made = [int(chunk[0, 0]) for chunk in namespace["made"]]
    assert made == ids[0][5:]
    whole_logits = namespace["converted"](input_ids=torch.tensor([[3, 1, 4, 1, 5, 9]])).logits.detach().numpy()
    assert namespace["text"] == made
    assert all(1 <= len(row) <= 20 for row in namespace["texts"])
    assert namespace["again"] in namespace["streams"]
    np.testing.assert_allclose(namespace["logits"][0, -1], whole_logits[0, -1], rtol=1e-4, atol=1e-5)
    assert len(set(made)) > 1  # one token for ever would prove little
    for written in ("plan.svg", "heatmap.png", "run/converted/graph.json", "affine/graph.json", "build/rnn/graph.json"):
        assert (folder / written).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "check"), [("README.md", check_readme), ("docs/guide.md", check_guide)], ids=["README", "guide"]
)
def test_a_document_runs(name: str, check: Callable[[dict[str, Any], Path], None], small: Path):
    check(run_document(ROOT / name), small)


def test_blocks_are_found_in_order_with_their_lines():
    text = "a\n```python\nx = 1\ny = 2\n```\nb\n```sh\nls\n```\n```python\nz\n```\n"
    assert blocks_of(text) == [Block("python", "x = 1\ny = 2\n", 2), Block("sh", "ls\n", 7), Block("python", "z\n", 10)]


def test_a_wrong_block_names_the_documents_line():
    with pytest.raises(ZeroDivisionError) as raised:
        run_python(Block("python", "x = 1\nx / 0\n", 4), Path("guide.md"), {})
    last = traceback.extract_tb(raised.tb)[-1]
    assert (last.filename, last.lineno) == ("guide.md", 6)


def test_a_command_that_is_not_there_or_has_no_such_option_is_found():
    with pytest.raises(AssertionError, match="no target voyage"):
        run_command(["make", "voyage"])
    with pytest.raises(AssertionError, match="No such option"):
        run_command(["thesean", "targets", "--colour"])
    with pytest.raises(Exception, match="No such option"):  # of a click of typer's own
        run_command(["thesean", "plan", "m:g", "--target", "auto", "--colour"])
    with pytest.raises(AssertionError, match="say here how to check it"):
        run_command(["rm", "x"])


def test_lines_that_end_in_a_backslash_are_one_command():
    block = Block("sh", "thesean plan m:g \\\n  -t 'h.0=keep'\n\nmake test  # all of them\n", 0)
    assert commands_of(block) == [["thesean", "plan", "m:g", "-t", "h.0=keep"], ["make", "test"]]
