"""B batch, T time, D width"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.distill.tools import batches_of, drafted
from tests.models import vectors
from thesean.distill import closed_form, ridge
from thesean.distill.closed_form import solve_parts
from thesean.errors import NumericalError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.graph.intermediates import intermediates
from thesean.passes.plan.hybrid import Hybrid
from thesean.targets import Target, TargetModule
from thesean.targets.shared.sequence import SequenceTarget


def inputs_of(guide: Captured, count: int = 8, batch: int = 16, seed: int = 0):
    return [inputs for _, inputs in batches_of(guide, count, batch, seed=seed)]


@torch.no_grad()
def error_at(guide: Captured, hybrid: Hybrid, part: int, seed: int = 9) -> float:
    """Normalised squared error at a part's exit on fresh inputs."""
    own, theirs = hybrid.boundaries[part]
    (inputs,) = inputs_of(guide, 1, 64, seed=seed)
    y = intermediates(hybrid.graph_module, [own], with_output=False)(**inputs)[own]
    g = intermediates(guide.graph_module, [theirs], with_output=False)(**inputs)[theirs]
    return float((y - g).square().sum() / (g - g.mean(0)).square().sum())


def test_a_linear_map_of_the_features_is_recovered_exactly():
    """The guide's part is relu(Wx + b): a target whose features are relu(Wx + b) has the identity to find."""
    guide = captured.mlp()
    _, hybrid = drafted(guide, Target("mlp", width=8, activation="relu", hidden_norm="none"), keep=["2*", "4*"])
    module, weights = hybrid.graph_module.part_0, dict(guide.graph_module.named_parameters())
    with torch.no_grad():
        module.first[0].weight.copy_(weights["0.weight"])
        module.first[0].bias.copy_(weights["0.bias"])
    assert solve_parts(guide.graph_module, hybrid, [0], inputs_of(guide), ridge=1e-12) == ["part_0"]
    torch.testing.assert_close(module.last.weight, torch.eye(8), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.last.bias, torch.zeros(8), rtol=1e-4, atol=1e-4)
    assert error_at(guide, hybrid, 0) < 1e-8


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("guide", "target"),
    [(captured.mlp, "mlp"), (captured.resnet, "mlp"), (captured.gpt2, "gru"), (captured.bert, "mingru")],
)
def test_each_part_comes_nearer_to_the_guide(guide, target):
    _, hybrid = drafted(guide(), target)
    hybrid.graph_module.eval()
    before = [error_at(guide(), hybrid, k) for k in range(len(hybrid.parts))]
    solve_parts(guide().graph_module, hybrid, range(len(hybrid.parts)), inputs_of(guide(), 16), ridge=1e-3)
    after = [error_at(guide(), hybrid, k) for k in range(len(hybrid.parts))]
    assert all(a < b for a, b in zip(after, before, strict=True)), (before, after)


def test_the_guide_stays_and_so_does_all_but_the_last_layer():
    guide = captured.gpt2()
    _, hybrid = drafted(guide, "gru")
    theirs, own = models.state_of(guide.graph_module), models.state_of(hybrid.graph_module)
    solve_parts(guide.graph_module, hybrid, [0, 1], inputs_of(guide), ridge=1e-3)
    assert models.same_state(guide.graph_module, theirs)
    changed = {k for k, v in hybrid.graph_module.state_dict().items() if not torch.equal(v, own[k])}
    assert changed == {f"part_{k}.last.{name}" for k in (0, 1) for name in ("weight", "bias")}


def test_a_target_that_adds_its_input_solves_for_the_rest():
    guide = captured.gpt2()
    _, hybrid = drafted(guide, Target("gru", scope="part"))
    before = error_at(guide, hybrid, 0)
    solve_parts(guide.graph_module, hybrid, [0], inputs_of(guide, 16), ridge=1e-3)
    assert error_at(guide, hybrid, 0) < before


def test_drift_of_earlier_parts_is_corrected_where_a_part_joins_the_stream():
    """Part 0 puts a constant error on the residual stream; solving part 1 for the stream takes it away again."""
    guide = captured.token_mixer()
    _, hybrid = drafted(guide, "gru")
    assert all(r.join for r in hybrid.replacements)
    solve_parts(guide.graph_module, hybrid, [0, 1], inputs_of(guide, 16), ridge=1e-3)
    with torch.no_grad():
        hybrid.graph_module.part_0.last.bias.add_(3.0)
    drifted = error_at(guide, hybrid, 1)
    solve_parts(guide.graph_module, hybrid, [1], inputs_of(guide, 16), ridge=1e-3)
    corrected = error_at(guide, hybrid, 1)
    assert corrected < 0.5 * drifted, (drifted, corrected)


def test_an_offset_on_the_stream_is_all_corrected_by_the_next_part():
    """The two-sided check: with zero features left to explain, the bias alone takes the whole offset."""
    guide = captured.token_mixer()
    _, hybrid = drafted(guide, "gru", keep=["*mix.0*"])
    (r,) = hybrid.replacements
    assert r.join is not None
    assert r.guide_join is not None
    own = intermediates(hybrid.graph_module, [r.join[0]], with_output=False)
    theirs = intermediates(guide.graph_module, [r.guide_join], with_output=False)
    data = inputs_of(guide, 4)
    solve_parts(guide.graph_module, hybrid, [0], data, ridge=1e-3)
    got = torch.cat([own(**x)[r.join[0]] for x in data]).flatten(0, 1)
    want = torch.cat([theirs(**x)[r.guide_join] for x in data]).flatten(0, 1)
    torch.testing.assert_close(got.mean(0), want.mean(0), rtol=1e-4, atol=1e-4)  # residuals of a fit have mean zero


def test_parts_that_were_copied_whole_are_left_alone_when_asked():
    guide = captured.gpt2()
    _, hybrid = drafted(guide, "linear-attention")
    before = models.state_of(hybrid.graph_module)
    assert solve_parts(guide.graph_module, hybrid, [0, 1], inputs_of(guide), ridge=1e-3, solve_copied=False) == []
    assert models.same_state(hybrid.graph_module, before)
    assert solve_parts(guide.graph_module, hybrid, [0, 1], inputs_of(guide), ridge=1e-3) == ["part_0", "part_1"]


def test_a_module_of_your_own_without_a_last_layer_is_left_alone():
    guide = captured.mlp()
    _, hybrid = drafted(guide, Target("mine", build=lambda part: torch.nn.Linear(8, 8)))
    assert solve_parts(guide.graph_module, hybrid, [0, 1, 2], inputs_of(guide), ridge=1e-3) == []


class Unbiased(TargetModule):
    """A layer of someone's own whose last one adds nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8, bias=False)

    def features(self, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, None]:
        return torch.sigmoid(x), None


@torch.no_grad()
def test_a_last_layer_without_a_bias_is_solved_without_an_intercept():
    guide, data = captured.mlp(), inputs_of(captured.mlp())
    _, hybrid = drafted(guide, Target("mine", build=lambda part: Unbiased()), keep=["2*", "4*"])
    (r,) = hybrid.replacements
    solve_parts(guide.graph_module, hybrid, [0], data, ridge=1e-9)
    x_ND = torch.cat([x["input"] for x in data])
    theirs = intermediates(guide.graph_module, [r.guide_exit], with_output=False)
    wanted_NO = torch.cat([theirs(**x)[r.guide_exit] for x in data])
    weight_EO = torch.linalg.lstsq(torch.sigmoid(x_ND), wanted_NO).solution
    module = hybrid.module(r)
    assert isinstance(module, Unbiased)
    assert wanted_NO.mean(0).abs().max() > 0.1  # what an intercept would take
    torch.testing.assert_close(module.last.weight, weight_EO.T, rtol=1e-3, atol=1e-4)


def test_training_flags_come_back():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    hybrid.graph_module.train()
    solve_parts(guide.graph_module, hybrid, [0], inputs_of(guide), ridge=1e-3)
    assert all(m.training for m in hybrid.graph_module.modules())


def test_features_that_do_not_vary_are_no_division_by_zero():
    guide = capture(models.mlp(), vectors(2, 8))
    _, hybrid = drafted(guide)
    constant = [{"input": torch.ones(4, 8)}]
    solve_parts(guide.graph_module, hybrid, [0, 1, 2], constant, ridge=1e-3)
    assert hybrid.graph_module(torch.ones(4, 8)).isfinite().all()
    torch.testing.assert_close(hybrid.graph_module(torch.ones(4, 8)), guide.graph_module(torch.ones(4, 8)))


def test_a_row_counts_once_and_less_where_it_is_far_larger_than_others(monkeypatch: pytest.MonkeyPatch):
    """By the square of how much larger it is than eight times the median."""
    guide, seen = captured.mlp(), []
    _, hybrid = drafted(guide)
    add = ridge._Sums.add

    def looked(self, features, residual, weight_N=None):
        seen.append((residual.norm(dim=1), weight_N))
        add(self, features, residual, weight_N)

    monkeypatch.setattr(ridge._Sums, "add", looked)
    data = inputs_of(guide, 1, 16)
    data[0]["input"][3] *= 1e4
    solve_parts(guide.graph_module, hybrid, [0], data, ridge=1e-3)
    size_N, weight_N = map(torch.cat, zip(*seen, strict=True))
    limit, large = 8 * size_N.median(), int(size_N.argmax())
    assert len(size_N) == 16  # fitted and held out
    assert size_N[large] > 100 * limit
    torch.testing.assert_close(weight_N[large], (limit / size_N[large]).square())
    assert torch.equal(weight_N[torch.arange(16) != large], torch.ones(15))


def test_not_a_number_in_the_data_names_the_part():
    guide = captured.mlp()
    _, hybrid = drafted(guide)
    data = [{"input": torch.full((4, 8), float("nan"))}]
    with pytest.raises(NumericalError, match=r"^0\.\.1: activations are not finite"):
        solve_parts(guide.graph_module, hybrid, [0], data, ridge=1e-3)


@torch.no_grad()
def test_what_stays_of_the_stream_says_nothing_that_the_features_of_the_same_row_do():
    """The normal equations: features and what is left of each row's own stream are uncorrelated after the fit."""
    guide = captured.token_mixer()
    _, hybrid = drafted(guide, "gru")
    r = hybrid.replacements[1]
    module = hybrid.module(r)
    assert isinstance(module, TargetModule)
    assert r.join is not None
    assert r.guide_join is not None
    data = inputs_of(guide)
    solve_parts(guide.graph_module, hybrid, [1], data, ridge=1e-9)  # behind part 0, whose errors differ from row to row
    names = [r.entry, r.join[0]]
    own = [intermediates(hybrid.graph_module, names, with_output=False)(**x) for x in data]
    theirs = [intermediates(guide.graph_module, [r.guide_join], with_output=False)(**x) for x in data]
    features_NE = torch.cat([module.features(o[names[0]])[0].flatten(0, 1) for o in own]).double()
    pairs = zip(theirs, own, strict=True)
    left_NO = torch.cat([(t[r.guide_join] - o[names[1]]).flatten(0, 1) for t, o in pairs]).double()
    assert left_NO.std() > 0.1  # part 0 left something that no row of features says
    width = features_NE.shape[1]
    correlation_EO = torch.corrcoef(torch.cat([features_NE, left_NO], 1).T)[:width, width:]
    assert correlation_EO.abs().max() < 1e-2


@pytest.mark.parametrize("target", [Target("gru"), Target("linear-attention", window=0), Target("bounded-attention")])
def test_a_solved_part_reads_each_batch_once_and_hands_on_what_it_would_give(target, monkeypatch):
    """Small batches of one shape as one; the same as where each is read by itself, and where every module is run again
    for the next part's inputs.
    """
    guide, runs = captured.gpt2(), list[SequenceTarget]()
    batches = [*inputs_of(guide, 5, 4), *inputs_of(guide, 1, 3, seed=1)]

    def solved() -> tuple[list[int], list[torch.Tensor]]:
        _, hybrid = drafted(guide, target)
        modules = [cast(SequenceTarget, hybrid.module(r)) for r in hybrid.replacements]
        mix = type(modules[0]).mix

        def counted(self: SequenceTarget, *given: Any) -> Any:
            runs.append(self)
            return mix(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(type(modules[0]), "mix", counted)
            solve_parts(guide.graph_module, hybrid, [0, 1], batches, ridge=1e-2)
        return [runs.count(module) for module in modules], [module.last.weight for module in modules]

    together, weights = solved()
    monkeypatch.setattr("thesean.distill.joined._MOST", 0)
    alone, same = solved()
    monkeypatch.setattr(closed_form, "_COMPLETED", ())
    again, as_run = solved()
    assert (together, alone, again) == ([1, 1], [6, 6], [12, 6])
    for one, other, third in zip(weights, same, as_run, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(third, other, rtol=1e-4, atol=1e-6)


def test_a_covariance_that_rounding_left_without_a_root_is_solved_all_the_same():
    generator = torch.Generator().manual_seed(0)
    root, wanted = torch.randn(6, 6, generator=generator).double(), torch.randn(6, 2, generator=generator).double()
    signs = torch.tensor([1.0, 1, 1, 1, 1, -1]).double()
    for diagonal in (torch.ones_like(signs), signs):
        matrix = root @ diagonal.diag() @ root.T
        torch.testing.assert_close(matrix @ ridge._solved(matrix, wanted), wanted)


class Noise(nn.Module):
    """As good as noise to whoever has few examples of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.third(self.second((50 * self.first(x)).sin()))
        return out


@pytest.mark.parametrize(("count", "batch"), [(1, 16), (2, 8), (8, 16)])
def test_some_examples_are_held_out_however_few_the_batches_are(count: int, batch: int):
    """A part that nothing foretells is no further than its mean, and not what more features than examples fit."""
    guide = capture(models.seeded(Noise), vectors(3, 8))
    _, hybrid = drafted(guide, Target("mlp", width=64))
    before = error_at(guide, hybrid, 0)
    solve_parts(guide.graph_module, hybrid, [0], inputs_of(guide, count, batch), ridge=1e-3)
    assert error_at(guide, hybrid, 0) <= 1.01 * before
