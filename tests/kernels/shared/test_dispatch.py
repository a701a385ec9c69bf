"""Which implementation runs, and what asking for one that isn't there says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import thesean.kernels
from thesean.errors import MissingExtraError, UnknownNameError
from thesean.kernels.linear_recurrence import linear_recurrence
from thesean.kernels.shared import dispatch
from thesean.kernels.shared.dispatch import choose


@pytest.fixture
def doubling_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file `doubling_triton.py` in a folder that the kernels' namespace reaches."""
    (tmp_path / "doubling_triton.py").write_text(
        "def doubling(x):\n    return 2 * x\n\n\ndef twice(x):\n    return 4 * x\n"
    )
    monkeypatch.setattr(thesean.kernels, "__path__", [*thesean.kernels.__path__, str(tmp_path)])
    return "doubling"


def test_auto_and_torch_are_the_reference_on_a_cpu(doubling_kernel):
    assert choose("auto", "doubling", torch.device("cpu")) == "torch"
    assert choose("torch", "doubling", torch.device("cuda")) == "torch"
    assert choose("auto", "linear_recurrence") == "torch"


def test_an_operation_without_a_kernel_refuses_triton_by_name():
    with pytest.raises(ValueError, match=r"no_such_op: no Triton kernel is registered. Use backend='torch'"):
        choose("triton", "no_such_op")


def test_a_file_beside_the_reference_registers_a_kernel(doubling_kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert choose("triton", doubling_kernel) == "triton"
    assert choose("auto", doubling_kernel, torch.device("cuda")) == "triton"
    assert dispatch.load(doubling_kernel)(21) == 42
    assert dispatch.load(doubling_kernel, "twice")(21) == 84


def test_a_kernel_without_triton_says_which_extra_to_install(doubling_kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert choose("auto", doubling_kernel, torch.device("cuda")) == "torch"
    with pytest.raises(MissingExtraError, match=r"pip install 'thesean-compiler\[kernels\]'"):
        choose("triton", doubling_kernel)


def test_an_unknown_backend_gets_the_nearest_name():
    with pytest.raises(UnknownNameError, match="unknown backend 'trition'; did you mean 'triton'"):
        choose("trition", "cka")  # type: ignore[arg-type]


def test_the_operation_hands_its_inputs_to_the_chosen_kernel(monkeypatch):
    monkeypatch.setattr("thesean.kernels.linear_recurrence.choose", lambda backend, op, device: "triton")
    monkeypatch.setattr("thesean.kernels.linear_recurrence.load", lambda op: lambda a, b, h: (a + b, h))
    x_BTD, state_BD = torch.ones(1, 2, 3), torch.zeros(1, 3)
    hidden_BTD, last_BD = linear_recurrence(x_BTD, x_BTD, state_BD)
    assert torch.equal(hidden_BTD, 2 * x_BTD)
    assert last_BD is state_BD


def test_no_reference_imports_triton():
    (folder,) = thesean.kernels.__path__
    references = [path for path in Path(folder).glob("*.py") if not path.stem.endswith("_triton")]
    assert len(references) >= 4
    for path in references:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "triton" for name in names), path.name
