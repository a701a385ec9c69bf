"""The optimizer applies the rules that it always does, and tries fewer.

B batch, T time
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.models import vectors
from thesean.deploy import rewriting
from thesean.deploy.decomposing import decomposed_where_needed
from thesean.deploy.lowering.to_onnx import quiet
from thesean.deploy.rewriting import rules_by_operator
from thesean.deploy.torchlib import table_kept

pytest.importorskip("onnxruntime")
matchers = pytest.importorskip("onnxscript.rewriter._matcher")


class Rewritten(nn.Module):
    """Transposed, clamped and viewed twice, cast to what it is: what rules of onnxscript make one of, or none."""

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        y_BT = x_BT.transpose(0, 1).transpose(0, 1).clamp(0, 2).clamp(0, 1) + 0
        return y_BT.unsqueeze(0).unsqueeze(0).squeeze(0).squeeze(0).to(torch.float64).to(torch.float32).relu().relu()


class Halved(nn.Module):
    """Two slices, as a rule of several outputs looks for them."""

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BT.unsqueeze(-1) * torch.arange(6.0)
        return x_BTD[:, :, :3] * x_BTD[:, :, 3:6].relu()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators at which a pattern was compared."""
    names: list[str] = []
    before = matchers.SimplePatternMatcher.match

    def counted(matcher: Any, model: Any, graph: Any, node: Any, **settings: Any) -> Any:
        names.append(node.op_type)
        return before(matcher, model, graph, node, **settings)

    monkeypatch.setattr(matchers.SimplePatternMatcher, "match", counted)
    return names


def exported(module: nn.Module, within: AbstractContextManager[None]) -> Any:
    with quiet(), table_kept(), decomposed_where_needed(), within:
        program = torch.onnx.export(
            module.eval(), (vectors(2, 7),), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},), opset_version=20,
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize(("module", "gone"), [(Rewritten, "Transpose"), (Halved, None)])
def test_the_file_is_onnxscripts_own_and_a_tenth_of_the_patterns_are_compared(tried, module, gone):
    expected = exported(module(), nullcontext())
    in_all = len(tried)
    tried.clear()
    found = exported(module(), rules_by_operator())
    assert found.SerializeToString() == expected.SerializeToString()
    assert gone not in [n.op_type for n in found.graph.node]  # where a rule was applied
    assert 0 < len(tried) < in_all / 10


def test_a_rule_of_several_outputs_begins_with_the_first_of_them():
    """It looks through the whole file for the others, which for each node of a file takes long."""
    rules = pytest.importorskip("onnxscript.rewriter")._DEFAULT_REWRITE_RULES
    (several,) = (rule for rule in rules if len(rule._target_pattern.output_nodes) > 1)
    assert rewriting._begins(several) == ("", "Slice")


def test_onnxscripts_own_method_is_back_afterwards_and_after_an_error():
    rule, before = rewriting._optimizer()
    assert rule is not None  # a release that has it elsewhere exports in more time

    def interrupted() -> None:
        with rules_by_operator():
            assert rule.try_rewrite is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert rule.try_rewrite is before


def test_a_release_that_has_it_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    rule, before = rewriting._optimizer()
    monkeypatch.setattr(rewriting, "_optimizer", lambda: (None, None))
    with rules_by_operator():
        assert rule.try_rewrite is before
