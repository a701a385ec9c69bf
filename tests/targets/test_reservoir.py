"""B batch, T time, D width, E units, P units of a block"""

from __future__ import annotations

import pytest
import torch

from tests import captured
from tests.distill.tools import batches_of, drafted
from tests.targets.build import build
from thesean.distill.closed_form import solve_parts
from thesean.errors import TargetMismatchError
from thesean.passes.graph.intermediates import intermediates
from thesean.targets import get_family


def test_units_are_four_times_the_width_in_blocks_of_at_most_64(sequence_part):
    found = [build("reservoir", sequence_part(width_in=width)) for width in (16, 40, 128)]
    assert [(m.width, m.heads, tuple(m.recurrent_GPP.shape)) for m in found] == [
        (64, 1, (1, 64, 64)),
        (160, 4, (4, 40, 40)),
        (512, 8, (8, 64, 64)),
    ]
    assert build("reservoir", sequence_part(), width=10).width == 10
    assert build("reservoir", sequence_part(), width=67).recurrent_GPP.shape == (
        67,
        1,
        1,
    )  # a prime has no other blocks
    assert build("reservoir", sequence_part(), expand=2, heads=4).recurrent_GPP.shape == (4, 8, 8)
    assert build("reservoir", sequence_part("bidirectional")).last.in_features == 2 * 64 + 16


def test_only_the_readout_can_be_trained(sequence_part):
    module = build("reservoir", sequence_part("bidirectional"), scope="part")
    assert {name for name, _ in module.named_parameters()} == {"last.weight", "last.bias"}
    assert {"recurrent_GPP", "input_UD", "bias_U", "leak_U", "mean_D", "gain_D"} <= module.state_dict().keys()


def test_each_block_is_orthogonal_times_the_radius(sequence_part):
    module = build("reservoir", sequence_part(), heads=4, radius=0.7)
    for block_PP in module.recurrent_GPP:
        torch.testing.assert_close(block_PP @ block_PP.T, 0.49 * torch.eye(16), rtol=0, atol=1e-5)


def test_leaks_average_over_memories_from_short_to_long(sequence_part):
    module = build("reservoir", sequence_part(), memory=(1.0, 100.0))
    memories_E = -1 / torch.log1p(-module.leak_U)
    torch.testing.assert_close(memories_E, torch.logspace(0, 2, 64), rtol=1e-3, atol=0)


def test_the_features_are_the_units_and_the_input(sequence_part):
    module = build("reservoir", sequence_part(), width=6, heads=2).double().eval()
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    features_BTS, state_BE = module.features(x_BTD)
    recurrent_EE = torch.block_diag(*module.recurrent_GPP)
    hidden_BE = torch.zeros(2, 6, dtype=torch.float64)
    for t, x_BD in enumerate(x_BTD.unbind(1)):
        heard_BE = torch.tanh(hidden_BE @ recurrent_EE.T + x_BD @ module.input_UD.T + module.bias_U)
        hidden_BE = hidden_BE + module.leak_U * (heard_BE - hidden_BE)
        torch.testing.assert_close(features_BTS[:, t], torch.cat([hidden_BE, x_BD], -1))
    torch.testing.assert_close(state_BE, hidden_BE)


def test_where_it_began_is_forgotten(sequence_part):
    """The echo state property: two beginnings, one input, the same state in the end."""
    module = build("reservoir", sequence_part(), memory=(1 / 3, 4.0)).eval()
    x_BTD = torch.randn(1, 300, 16)
    _, from_zero = module(x_BTD, torch.zeros(1, 64))
    _, from_one = module(x_BTD, torch.ones(1, 64))
    torch.testing.assert_close(from_one, from_zero, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["mixing", "part"])
def test_prepare_standardises_what_the_units_read_however_often_it_is_called(scope, sequence_part):
    part = sequence_part()
    module = build("reservoir", part, scope=scope)
    x_BTD = torch.randn(4, 50, 16) * torch.logspace(-2, 2, 16) + 30
    x_BTD[..., 3] = 7.0  # constant
    examples = [(x_BTD[:2], x_BTD[:2]), (x_BTD[2:, :20], x_BTD[2:, :20])]
    for _ in range(2):
        module.prepare(part, examples)
    seen_ND = torch.cat([module.features(x)[0][..., 64:].flatten(0, 1) for x, _ in examples])
    assert torch.isfinite(seen_ND).all()
    torch.testing.assert_close(seen_ND.mean(0), torch.zeros(16), rtol=0, atol=1e-3)
    assert (seen_ND.std(0) < 1.01).all()
    if scope == "mixing":
        torch.testing.assert_close(seen_ND[:, 8:].std(0), torch.ones(8), rtol=0.01, atol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("guide", [captured.gpt2, captured.bert])
def test_solved_in_closed_form_it_comes_near_to_the_guide(guide):
    _, hybrid = drafted(guide(), "reservoir")
    inputs = [i for _, i in batches_of(guide(), 16, 16)]

    def error(part: int) -> float:
        own, theirs = hybrid.boundaries[part]
        ((_, fresh),) = batches_of(guide(), 1, 64, seed=9)
        with torch.no_grad():
            y = intermediates(hybrid.graph_module, [own], with_output=False)(**fresh)[own]
            g = intermediates(guide().graph_module, [theirs], with_output=False)(**fresh)[theirs]
        return float((y - g).square().sum() / (g - g.mean(0)).square().sum())

    before = [error(k) for k in range(len(hybrid.parts))]
    solve_parts(guide().graph_module, hybrid, range(len(hybrid.parts)), inputs, ridge=1e-3)
    after = [error(k) for k in range(len(hybrid.parts))]
    assert all(a < 0.5 * b for a, b in zip(after, before, strict=True)), (before, after)


def test_a_delayed_input_is_recalled_by_a_readout_in_closed_form(sequence_part):
    """What the plain input can't tell: the readout on units and input recovers x of three steps ago."""
    module = build("reservoir", sequence_part(width_in=2), width=128).eval()
    x_BTD = torch.randn(8, 120, 2)
    features_NS = module.features(x_BTD)[0][:, 20:].flatten(0, 1)
    wanted_ND = x_BTD[:, 17:-3].flatten(0, 1)
    solution = torch.linalg.lstsq(features_NS, wanted_ND).solution
    assert (features_NS @ solution - wanted_ND).square().mean() < 0.1 * wanted_ND.var()


def test_what_does_not_fit_is_refused(sequence_part):
    with pytest.raises(TargetMismatchError, match=r"layers.0: .* found 64 units in 3 blocks.* Set heads=1"):
        build("reservoir", sequence_part(), heads=3)
    with pytest.raises(TargetMismatchError, match="option 'radius': Input should be less than 1"):
        build("reservoir", sequence_part(), radius=1.0)


def test_it_replaces_what_mixes():
    assert get_family("reservoir").scope == "mixing"
