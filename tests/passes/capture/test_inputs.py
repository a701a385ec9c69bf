"""What is looked through, and what is refused in a line that says what to give instead.

B batch, D width
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import vectors
from thesean.errors import CaptureError, DataError, TheseanError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.inputs import forward_parameters


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.first(x) if y is None else self.first(x) * y)


class HandsOn(nn.Module):
    """As adapters wrap a model, with a weight of its own beside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.beside, self.base_model = nn.Linear(1, 1), model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Adapted(nn.Module):
    """A frozen linear map and a small one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.base_layer(x, *args, **kwargs) + self.up["default"](self.down["default"](x))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, compiled, HandsOn, lambda m: HandsOn(HandsOn(m)), lambda m: nn.DataParallel(HandsOn(m))],
)
def test_a_wrapper_takes_what_the_module_inside_takes_by_position_too(wrap: Callable[[nn.Module], nn.Module]):
    torch.manual_seed(0)
    guide = Pair().eval()
    x, y = vectors(3, 6), vectors(3, 6, seed=1)
    captured = capture(wrap(guide).eval(), (x, y))
    assert [s.name for s in captured.signature.inputs] == ["x", "y"]
    assert torch.allclose(captured.graph_module(x=x, y=y), guide(x, y), atol=1e-6)


class Reads(nn.Module):
    """Has a name of its own for what it reads, and hands the rest on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, batch: torch.Tensor, **rest: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inside(batch, **rest)
        return y


def test_a_wrapper_that_names_what_it_reads_is_asked_for_that():
    assert list(forward_parameters(Reads())) == ["batch", "rest"]


def test_torchs_own_wrappers_leave_no_trace_in_the_names():
    names = {n for n, _ in Pair().named_parameters()}
    for wrap in (nn.DataParallel, compiled):
        wrapped: Any = wrap(Pair())
        captured = capture(wrapped.eval(), vectors(3, 6))
        assert {n for n, _ in captured.graph_module.named_parameters()} == names


def test_an_adapters_small_maps_train_and_what_it_adapts_stays_frozen():
    guide = Pair()
    guide.add_module("first", Adapted(guide.first))
    captured = capture(HandsOn(guide).eval(), vectors(3, 6))
    trained = {n for n, p in captured.graph_module.named_parameters() if p.requires_grad}
    assert {n.removeprefix("base_model.") for n in trained} == {
        "first.down.default.weight", "first.up.default.weight", "last.weight", "last.bias",
    }  # fmt: skip


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(6, 6)))


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Pair().eval(), {nn.Linear}, dtype=torch.qint8)


def offloaded() -> nn.Module:
    guide = Pair()
    guide.last.to("meta")
    return guide


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript itself
@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (scripted, CaptureError, "the guide is a TorchScript module.*Give the module it was made from"),
        (lambda: HandsOn(scripted()), CaptureError, "the guide's 'base_model' is a TorchScript module"),
        (quantised, CaptureError, r"'first\._packed_params' holds packed, quantised weights.*Give the float module"),
        (offloaded, DataError, r"spread over \['cpu', 'meta'\]; expected one device\. Load it without a device map"),
    ],
)
def test_what_can_not_be_traced_is_refused_with_what_to_give(make, error: type[TheseanError], told: str):
    with pytest.raises(error, match=told):
        capture(make().eval(), vectors(3, 6))


class StateIn(nn.Module):
    def forward(self, state_in_0: torch.Tensor) -> torch.Tensor:
        return state_in_0 * 2


def test_an_input_is_a_tensor_that_is_not_called_as_a_files_states_are():
    with pytest.raises(DataError, match=r"found ndarray\. Make it one: torch\.as_tensor"):
        capture(Pair().eval(), {"x": vectors(3, 6).numpy()})
    with pytest.raises(DataError, match="an exported file's own states are called so"):
        capture(StateIn().eval(), vectors(3, 6))
