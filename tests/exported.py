"""Untrained hybrids of the guides of tests/captured.py and their ONNX files, exported once for all tests.

Nobody may change a module or a file; who must exports a copy of its own.

B batch, T time
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import fx

from tests import captured
from thesean.deploy.export import ExportReport, export
from thesean.deploy.session import Session
from thesean.passes.bound_positions import BoundPositions
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.signature import Signature
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target

_folder = tempfile.TemporaryDirectory(prefix="thesean_exported_")  # until the process ends


@dataclass(frozen=True, kw_only=True)
class Exported:
    module: fx.GraphModule
    signature: Signature
    report: ExportReport

    @property
    def path(self) -> Path:
        return self.report.path

    @cached_property
    def session(self) -> Session:
        return Session(self.path)


def hybrid(
    guide: Captured, target: str | Target | Mapping[str, str | Target], count: int | None = None
) -> fx.GraphModule:
    """The guide with its first `count` parts replaced by untrained modules, the same weights each time."""
    torch.manual_seed(0)
    return build_hybrid(make_plan(guide, target), count).graph_module.eval()


@cache
def gpt2_gru() -> Exported:
    """Both attentions recurrent, a state each; runs on past its table."""
    module = hybrid(captured.gpt2(), "gru")
    assert BoundPositions()(module).modified
    report = export(module, captured.gpt2().signature, Path(_folder.name) / "gpt2_gru.onnx", train_length=30)
    return Exported(module=module, signature=captured.gpt2().signature, report=report)


@cache
def gpt2_guide() -> Exported:
    """The guide itself, which has no state."""
    guide = captured.gpt2()
    report = export(guide.graph_module, guide.signature, Path(_folder.name) / "gpt2_guide.onnx", stateful=False)
    return Exported(module=guide.graph_module, signature=guide.signature, report=report)
