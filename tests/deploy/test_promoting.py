"""The casts of a file are torch's own, though no program is run once more for them.

B batch, T time
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

from tests.models import vectors
from thesean.deploy import promoting
from thesean.deploy.decomposing import decomposed_where_needed
from thesean.deploy.lowering.to_onnx import quiet
from thesean.deploy.promoting import promoted_by_value
from thesean.deploy.torchlib import table_kept

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


class MixedTypes(nn.Module):
    """A sum of truths, whole numbers beside fractions, float64 that comes back: each wants a cast of an operand."""

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        count_B1 = (x_BT > 0).sum(1, keepdim=True)
        steps_T = torch.arange(x_BT.shape[1], device=x_BT.device)
        share_BT = (count_B1 + steps_T) / 2
        wide_BT = share_BT * x_BT.to(torch.float64)
        return (wide_BT + steps_T).to(torch.float32) + (x_BT > share_BT) * 2


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are run to promote types."""
    targets: list[str] = []
    before = fx.Interpreter.call_function

    def counted(interpreter: Any, target: Any, *args: Any) -> Any:
        if type(interpreter).__name__ == "_TypePromotionInterpreter":
            targets.append(str(target))
        return before(interpreter, target, *args)

    monkeypatch.setattr(fx.Interpreter, "call_function", counted)
    return targets


def exported(within: AbstractContextManager[None]) -> Any:
    with quiet(), table_kept(), decomposed_where_needed(), within:
        program = torch.onnx.export(
            MixedTypes().eval(), (vectors(2, 7),), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},), opset_version=20,
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model_proto


def test_the_file_is_torchs_own_and_only_what_a_cast_changes_is_run(ran):
    expected = exported(nullcontext())
    by_torch = list(ran)
    ran.clear()
    found = exported(promoted_by_value())
    assert found.SerializeToString() == expected.SerializeToString()
    assert sum(n.op_type == "Cast" for n in found.graph.node) >= 4
    assert 0 < len(ran) < len(by_torch)


def test_the_file_gives_torchs_numbers_at_every_size():
    session = ort.InferenceSession(
        exported(promoted_by_value()).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for batch, time in [(2, 7), (1, 1), (5, 40)]:
        x_BT = vectors(batch, time, seed=time)
        (found,) = session.run(None, {session.get_inputs()[0].name: x_BT.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), MixedTypes()(x_BT), rtol=1e-6, atol=1e-6)


def test_torchs_own_method_is_back_afterwards_and_after_an_error():
    module, before = promoting._exporter()
    assert module is not None  # a torch that has it elsewhere exports in more time

    def interrupted() -> None:
        with promoted_by_value():
            assert module._TypePromotionInterpreter.run_node is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module._TypePromotionInterpreter.run_node is before


def test_a_torch_that_has_it_elsewhere_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    module, before = promoting._exporter()
    monkeypatch.setattr(promoting, "_exporter", lambda: (None, None))
    with promoted_by_value():
        assert module._TypePromotionInterpreter.run_node is before
