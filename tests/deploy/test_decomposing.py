"""What is left as it is when a graph is exported, and that it comes out as torch's own decompositions have it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests import models
from thesean.deploy import decomposing
from thesean.deploy.decomposing import decomposed_where_needed, keep_operators
from thesean.deploy.lowering.to_onnx import quiet
from thesean.deploy.torchlib import table_kept

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
aten = torch.ops.aten


class Reshapes(nn.Module):
    """Flattened over what is not contiguous, and taken apart again."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        mixed_BTD = x_BTD.unflatten(-1, (2, 4)).transpose(2, 3).flatten(2)
        return mixed_BTD.reshape(x_BTD.shape[0], x_BTD.shape[1], 4, 2).mT.contiguous()


class Lengthened(nn.Module):
    """Taken apart and flattened at a length that is a sum, beside a batch that may be empty."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        longer_BSD = torch.cat([x_BTD, x_BTD[:, :1]], 1)
        return longer_BSD.unflatten(-1, (2, 4)).transpose(2, 3).flatten(2)


class Doubled(nn.Module):
    """To a size that is a number times another, beside one that may be zero."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.transpose(0, 1).reshape(x_BTD.shape[1], 2 * x_BTD.shape[0], 4)


class Computed(nn.Module):
    """To a size that is a product of two, beside one that may be zero."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        scores_BTT = x_BTD @ x_BTD.mT
        return torch.stack([scores_BTT, scores_BTT], 2).flatten(1, 3)[..., None].expand(-1, -1, 2).flatten(1)


class Joined(nn.Module):
    """Batch and halves in one dimension, and time and halves in another."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        halves_B2TE = x_BTD.unflatten(-1, (2, 4)).transpose(1, 2)
        rows_RTE = halves_B2TE.reshape(-1, x_BTD.shape[1], 4)
        return rows_RTE.reshape(2 * x_BTD.shape[0], x_BTD.shape[1], 4) @ halves_B2TE.flatten(0, 1).mT


class Aliases(nn.Module):
    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        steps = torch.diff(x_BTD, prepend=x_BTD[:, :1], dim=1)
        kept = (steps > 0) & (x_BTD > 0) | (x_BTD < -1)
        return torch.where(kept, x_BTD.square(), steps).to(torch.float64).to(torch.float32)


class Expanded(nn.Module):
    """To another's width, which is a number; new dimensions in front too."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        wide_1BTD = x_BTD[..., :1].expand_as(x_BTD[None])
        return wide_1BTD[0] + x_BTD.mean((0, 1)).expand_as(torch.ones(3, 8)).sum(0)


class ExpandedOverTime(nn.Module):
    """To another's length, which has to be computed."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD[:, :1].expand_as(x_BTD) + x_BTD


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8).eval()
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(x_BTD.transpose(1, 2))


class Cut(nn.Module):
    """In pieces, the last one smaller, and in slices from either end."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        one, two, three = x_BTD.chunk(3, -1)
        early, late = x_BTD.narrow(1, 0, 1), x_BTD.narrow(2, -4, 4) + x_BTD.narrow(2, -5, 4)
        return torch.max(torch.cat([three, one, two], -1), early) * torch.min(late, 2 * late).repeat(1, 1, 2)


class CutOverTime(nn.Module):
    """In pieces as long as has to be computed."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        first, *_ = x_BTD.repeat(1, 2, 1).chunk(2, 1)
        return first


class Pooled(nn.Module):
    """To one place, and to more."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(places)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.pool(x_BTD.unflatten(-1, (2, 4))).flatten(1)


class Written(nn.Module):
    """Writes into a tensor of its own: torch's functionalisation is needed."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        y_BTD = x_BTD * 2
        y_BTD.add_(1)
        return y_BTD


def exported(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, bool]:
    """The file, and whether the graph was kept as it was."""
    kept: list[bool] = []

    def spy(*args: Any) -> bool:
        kept.append(keep_operators(*args))
        return kept[-1]

    monkeypatch.setattr(decomposing, "keep_operators", spy)
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    settings: dict[str, Any] = dict(dynamo=True, dynamic_shapes=shapes, opset_version=20, verbose=False)
    with quiet(), table_kept(), decomposed_where_needed():
        program = torch.onnx.export(module.eval(), (models.vectors(2, 7, 8),), **settings)
    assert program is not None
    return program.model_proto, kept == [True]


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (Reshapes(), True),
        (Aliases(), True),
        (Normalised(), True),
        (Expanded(), True),
        (Cut(), True),
        (Pooled(1), True),
        (Lengthened(), True),
        (Joined(), True),
        (Doubled(), True),
        (Computed(), False),
        (ExpandedOverTime(), False),
        (Written(), False),
    ],
)
def test_a_graph_without_a_second_trace_gives_torchs_numbers_at_every_size(module, kept, monkeypatch):
    proto, was_kept = exported(module, monkeypatch)
    assert was_kept == kept
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, time in [(2, 7), (1, 1), (5, 3), (3, 40)]:
        x_BTD = models.vectors(batch, time, 8, seed=time)
        (found,) = session.run(None, {session.get_inputs()[0].name: x_BTD.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), module(x_BTD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [Reshapes, Cut, partial(Pooled, 1)])
def test_it_is_written_in_the_operators_of_torchs_own_decomposition(make, monkeypatch):
    found, kept = exported(make(), monkeypatch)
    monkeypatch.setattr(decomposing, "_exporter", lambda: (None, None))
    expected, _ = exported(make(), monkeypatch)
    assert kept
    assert Counter(n.op_type for n in found.graph.node) == Counter(n.op_type for n in expected.graph.node)


@pytest.mark.parametrize("module", [CutOverTime(), Pooled(2)])
def test_what_would_have_to_be_computed_is_left_to_torch(module):
    """Whatever it makes of it."""
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    found = torch.export.export(module, (models.vectors(2, 8, 8),), dynamic_shapes=shapes).module()
    found.graph.eliminate_dead_code()
    before = [(n.target, n.args) for n in found.graph.nodes]
    assert not keep_operators(
        found, lambda target: target not in (aten.chunk.default, aten.adaptive_avg_pool2d.default)
    )
    assert [(n.target, n.args) for n in found.graph.nodes] == before


def test_torchs_own_function_is_back_afterwards_and_after_an_error():
    module, before = decomposing._exporter()
    assert module is not None  # a torch that has it elsewhere exports in twice the time

    def interrupted() -> None:
        with decomposed_where_needed():
            assert module.decompose_with_registry is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module.decompose_with_registry is before
