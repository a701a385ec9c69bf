"""Files compute what torch does of large and of small numbers too, which no example shows.

B batch, T time, D width
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.looking_back import FOLDS, WIDTH, LooksBack
from tests.models import seeded, vectors
from tests.passes.test_write_out_for_onnx import OF_ONE, OF_TWO, edges
from thesean.deploy.export import export
from thesean.deploy.session import Session
from thesean.errors import ExportError
from thesean.passes.capture.capture import capture

LENGTH = 300  # where what the scan adds up is 200 above its beginning


class Operators(nn.Module):
    """x_BD, y_BD -> by name what each operator makes of them, of numbers for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x * self.one
        found = {name: of(x) for name, of in OF_ONE.items() if name != "median, kept"}
        return found | {
            name: of(x, y) for name, of in OF_TWO.items() if name.partition(" ")[0] not in ("mean", "cross")
        }


@torch.no_grad()
def test_operators_that_torch_writes_for_middling_numbers_alone_are_right_at_the_edges(tmp_path: Path) -> None:
    x, y = edges(2)
    guide = capture(Operators().eval(), (vectors(3, x.shape[1]), vectors(3, x.shape[1])))
    export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
    found, _ = Session(tmp_path / "m.onnx").run({"x": x.numpy(), "y": y.numpy()})
    for name, expected in Operators()(x, y).items():
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


class Scans(nn.Module):
    """x_BTD -> y_BTD: products, sums of exponentials, largest and least values over time, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.mixings = nn.ModuleList(map(LooksBack, FOLDS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, mixing in zip(FOLDS, self.mixings, strict=True):
            x = x + getattr(mixing, name)(x).tanh()
        return x


FORMS = [pytest.param(name, marks=pytest.mark.thorough) for name in ("portable.onnx", "m.pt2")]


@torch.no_grad()
@pytest.mark.parametrize("form", ["m.onnx", *FORMS])
def test_scans_stream_and_are_right_far_beyond_the_example(form: str, tmp_path: Path) -> None:
    guide, x = capture(seeded(Scans).eval(), vectors(3, 11, WIDTH)), vectors(2, LENGTH, WIDTH)
    chunks = x.split([1, LENGTH - 8, 7], 1)
    path = tmp_path / form
    report = export(guide.graph_module, guide.signature, path, runtime="portable" if "port" in form else "onnxruntime")
    assert report.stateful
    if path.suffix == ".pt2":
        program = torch.export.load(str(path))
        values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
        states = {n: v for n, v in values.items() if n.startswith("state_in_")}
        state = {n: torch.zeros([len(x), *v.shape[1:]], dtype=v.dtype) for n, v in states.items()}
        pieces, module = [], program.module()
        for chunk in chunks:
            piece, *after = module(x=chunk, **state)
            state = dict(zip(state, after, strict=True))
            pieces.append(piece)
    else:
        stream = Session(path).stream()
        pieces = [torch.from_numpy(stream({"x": chunk.numpy()})["output"]) for chunk in chunks]
    # of sums near 200, whose difference counts, float32 keeps 1.5e-5
    torch.testing.assert_close(torch.cat(pieces, 1), guide.graph_module(x=x), rtol=1e-4, atol=1e-4)


def test_places_of_the_largest_values_are_refused(tmp_path: Path) -> None:
    class Places(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cummax(1).indices.float()

    guide = capture(Places(), vectors(3, 5, 4))
    with pytest.raises(ExportError, match="cummax"):
        export(guide.graph_module, guide.signature, tmp_path / "m.onnx")
