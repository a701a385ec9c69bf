"""A guide's own recurrent cells with fewer of their units.

B batch, T time, E units, G gates
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import models
from thesean.errors import NumericalError, TargetMismatchError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.hybrid import Hybrid, build_hybrid
from thesean.passes.plan.make_plan import make_plan
from thesean.targets import Target
from thesean.targets.shared.torch_cell import CellTarget

UNITS = 8
KINDS = {
    "lstm": lambda: nn.LSTM(6, UNITS, 2, batch_first=True),
    "gru": lambda: nn.GRU(6, UNITS, batch_first=True, bias=False),
    "elman": lambda: nn.RNN(6, UNITS, 2, batch_first=True, bidirectional=True),
}


class Tagger(nn.Module):
    """x_BTI -> y_BTO; with `inside` the cell stands between maps, beside the stream."""

    def __init__(self, cell: nn.RNNBase, inside: bool = False) -> None:
        super().__init__()
        self.cell, self.inside = cell, inside
        width = (cell.proj_size or cell.hidden_size) * (1 + cell.bidirectional)
        self.before, self.after = nn.Linear(6, 6), nn.Linear(width, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.after(self.cell(self.before(x))[0]) if self.inside else self.after(self.cell(x)[0])


def guide_of(kind: str, inside: bool = False) -> Captured:
    return capture(models.seeded(lambda: Tagger(KINDS[kind](), inside)), models.vectors(3, 11, 6))  # type: ignore[arg-type]


def cells(hybrid: Hybrid) -> list[CellTarget]:
    return [m for m in hybrid.graph_module.modules() if isinstance(m, CellTarget)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_loses_half_of_its_units(kind):
    guide = guide_of(kind)
    hybrid = build_hybrid(make_plan(guide, "narrow"))
    found = cells(hybrid)
    assert [(m.family, m.width) for m in found] == [(kind, UNITS // 2)] * (1 if kind == "gru" else 2)
    assert all(r.copied == ("cell",) for r in hybrid.replacements)


@pytest.mark.parametrize(("kind", "inside"), [*((kind, False) for kind in KINDS), ("gru", True)])
@torch.no_grad()
def test_all_units_are_the_guide(kind, inside):
    guide = guide_of(kind, inside)
    for target in (Target("narrow", ratio=1.0), Target(kind)):
        hybrid = build_hybrid(make_plan(guide, target)).graph_module.eval()
        assert any(isinstance(m, CellTarget) for m in hybrid.modules())
        x = models.vectors(2, 9, 6, seed=1)
        torch.testing.assert_close(hybrid(x), guide.graph_module(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def twice(cell: Any) -> Any:
    """The same cell with each unit there twice, and read by half from each."""
    wide = type(cell)(cell.input_size, 2 * cell.hidden_size, batch_first=True)
    for name, value in cell.named_parameters():
        rows = value.unflatten(0, (-1, cell.hidden_size)).repeat_interleave(2, 1).flatten(0, 1)
        getattr(wide, name).copy_(rows.repeat_interleave(2, 1) / 2 if "weight_hh" in name else rows)
    return wide


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_units_that_others_stand_in_for_go_without_a_trace(cell):
    torch.manual_seed(0)
    small = Tagger(cell(6, UNITS, batch_first=True)).eval()
    large = Tagger(twice(small.cell)).eval()
    guide = capture(large, models.vectors(3, 11, 6))
    hybrid = build_hybrid(make_plan(guide, "narrow"))
    (module,), (replacement,) = cells(hybrid), hybrid.replacements
    assert module.width == UNITS
    examples = [(x, large.cell(x)[0]) for x in (models.vectors(4, 30, 6, seed=s) for s in range(4))]
    module.prepare(replacement.facts, examples)
    x = models.vectors(2, 40, 6, seed=9)
    torch.testing.assert_close(hybrid.graph_module.eval()(x), guide.graph_module(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_chosen_with_data_it_is_nearer_than_chosen_by_weights():
    guide = guide_of("lstm")
    hybrid = build_hybrid(make_plan(guide, Target("narrow", ratio=0.75)))
    x = models.vectors(4, 40, 6, seed=9)
    far = (hybrid.graph_module.eval()(x) - guide.graph_module(x)).square().mean()
    converted = thesean.compile(
        models.seeded(lambda: Tagger(KINDS["lstm"]())),  # type: ignore[arg-type]
        Target("narrow", ratio=0.75),
        data=[models.vectors(4, 40, 6, seed=s) for s in range(8)], recipe="fast", progress=False,
    )  # fmt: skip
    near = (converted(x) - guide.graph_module(x)).square().mean()
    assert near < 0.5 * far


@torch.no_grad()
def test_a_module_that_reads_no_later_step_takes_the_cell_that_reads_none():
    guide = guide_of("elman")
    (first, *_) = cells(build_hybrid(make_plan(guide, Target("elman", causal=True))))
    own = dict(guide.graph_module.named_parameters())
    torch.testing.assert_close(first.core.weight_hh_l0, own["cell.weight_hh_l0"])
    assert not first.bidirectional


def test_another_kind_of_cell_is_not_copied():
    hybrid = build_hybrid(make_plan(guide_of("lstm"), "gru"))
    assert all(r.copied == () for r in hybrid.replacements)


def test_more_units_than_there_are_is_refused():
    with pytest.raises(TargetMismatchError, match=f"expected at most the {UNITS} units that there are"):
        make_plan(guide_of("gru"), Target("narrow", width=UNITS + 1))


def test_heads_of_a_cell_are_refused():
    with pytest.raises(TargetMismatchError, match="found a recurrent cell of 8 units, and the option 'heads'"):
        make_plan(guide_of("gru"), Target("narrow", heads=2))


def test_hidden_states_that_are_not_finite_are_told_by_the_part():
    hybrid = build_hybrid(make_plan(guide_of("gru"), "narrow"))
    (module,), (replacement,) = cells(hybrid), hybrid.replacements
    x = torch.full((2, 5, 6), torch.nan)
    with pytest.raises(NumericalError, match="cell: can't choose units"):
        module.prepare(replacement.facts, [(x, x)])


class Starting(nn.Module):
    """From where the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, UNITS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x, torch.cat([x, x], -1)[:, :1, :UNITS].transpose(0, 1).contiguous())[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    "model",
    [Starting(), Tagger(nn.LSTM(6, UNITS, batch_first=True, proj_size=6)), Tagger(nn.RNN(6, 8, 1, "relu"))],
    ids=["from another state", "projected", "rectified"],
)
def test_cells_that_are_none_of_these_are_not_read(model):
    guide = capture(model.eval(), models.vectors(3, 11, 6))
    with pytest.raises(thesean.TheseanError, match="narrow"):
        make_plan(guide, "narrow")
