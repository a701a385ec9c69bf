"""The walk through guide and hybrid, against running each prefix again."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from tests import captured, models
from tests.distill import reference
from tests.distill.tools import batches_of, drafted
from tests.kept_captures import capture
from tests.models import vectors
from thesean.distill.closed_form import Solver, solve_parts
from thesean.distill.partial import Partials, stand_apart
from thesean.distill.snapshot import with_state
from thesean.passes.capture.captured import Captured
from thesean.passes.graph import walk as walking
from thesean.passes.plan.hybrid import Hybrid
from thesean.targets import Target
from thesean.targets.linear_attention import LinearAttention


class Parallel(nn.Module):
    """x + mix(x) + mlp(x), both on the same normalised stream."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + (self.mix(h).cumsum(1) * 0.1 + self.mlp(h))


def parallel() -> Captured:
    torch.manual_seed(0)
    blocks = [Parallel(), Parallel(), Parallel()]
    return capture(nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 5)).eval(), vectors(3, 6, 8))


def two_inputs() -> Captured:
    return capture(models.seeded(models.TwoInputs), {"left": vectors(3, 8), "right": vectors(3, 8, seed=1)})


def two_outputs() -> Captured:
    return capture(models.seeded(models.TwoOutputs), vectors(3, 8))


CASES = {
    "gpt2": (captured.gpt2, "rnn", {}),
    "gpt2, wider than its window": (captured.gpt2, Target("linear-attention", window=3), {}),
    "gpt2, prepared by its activations": (captured.gpt2, "reservoir", {}),
    "gpt2, whole blocks": (captured.gpt2, Target("gru", scope="part"), {}),
    "gpt2, residual halves": (captured.gpt2, {"*attn": "gru", "*mlp": "narrow"}, {"granularity": "sublayer"}),
    "gpt2, merged": (lambda: captured.gpt2(4), "mingru", {"merge": 2}),
    "gpt2, fewer layers": (lambda: captured.gpt2(4), "copy", {"merge": 2}),
    "gpt2, every linear map": (captured.gpt2, "linear", {"granularity": "finest"}),
    "llama": (captured.llama, "rnn", {}),
    "bert, two inputs": (captured.bert, "mingru", {}),
    "a convnet with shortcuts": (captured.resnet, "mlp", {}),
    "a convnet with shortcuts, convolved": (captured.resnet, "conv", {"granularity": "sublayer"}),
    "parallel branches": (parallel, {"*mix": "gru", "*mlp": "mlp"}, {"granularity": "sublayer"}),
    "parallel branches, one dropped": (parallel, {"*mlp": "identity", "*mix": "gru"}, {"granularity": "sublayer"}),
    "parallel branches, both dropped": (parallel, "identity", {"granularity": "sublayer"}),
    "two inputs": (two_inputs, "mlp", {}),
    "two outputs": (two_outputs, "mlp", {}),
    "tied": (captured.tied, "mlp", {"keep": ["second"]}),
}
FEW = {"gpt2", "a convnet with shortcuts", "parallel branches", "parallel branches, both dropped", "two outputs"}
guides = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n, marks=() if n in FEW else pytest.mark.thorough) for n, c in CASES.items()]
)


def drawn(case) -> tuple[Captured, Hybrid, list[dict[str, torch.Tensor]]]:
    """A guide, its hybrid, and batches, of different length where that is free."""
    make, target, division = case
    guide = make()
    _, hybrid = drafted(guide, target, **division)
    batches = [batches_of(guide, 1, batch=12, time=time, seed=time)[0][1] for time in (5, 8, 13)]
    return guide, hybrid, batches


@guides
def test_the_walk_gives_what_running_the_prefix_again_gives(case):
    guide, hybrid, batches = drawn(case)
    plain = Hybrid(**{**vars(hybrid), "graph_module": deepcopy(hybrid.graph_module)})
    parts = range(len(hybrid.parts))
    reference.prepare(guide.graph_module, plain, batches)
    reference.solve(guide.graph_module, plain, parts, batches, ridge=1e-3)
    solver = Solver(guide.graph_module, hybrid, parts, batches, ridge=1e-3, preparing=True)
    for part in parts:
        solver.solve(part)
    wanted = plain.graph_module.state_dict()
    for name, value in hybrid.graph_module.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@guides
def test_each_hybrid_on_the_way_puts_out_what_it_does_when_it_is_built(case):
    make, target, division = case
    guide = make()
    bound_plan, hybrid = drafted(guide, target, **division)
    batches = drawn(case)[2]
    hybrid.graph_module.eval()
    state = {r.name: hybrid.module(r).state_dict() for r in hybrid.replacements}
    assert stand_apart(bound_plan, hybrid) == (case is not CASES["parallel branches, both dropped"])
    if not stand_apart(bound_plan, hybrid):
        return
    partials = Partials(guide.graph_module, hybrid, batches)
    for count in range(1, len(hybrid.parts) + 1):
        built = with_state(bound_plan, count, state).graph_module
        for number, inputs in enumerate(batches):
            with torch.no_grad():
                wanted = built(**inputs)
            torch.testing.assert_close(partials.output(count, number), wanted, rtol=0, atol=0)


def test_parts_in_another_order_are_solved_on_what_the_others_are_by_then():
    guide, hybrid, batches = drawn(CASES["gpt2"])
    plain = Hybrid(**{**vars(hybrid), "graph_module": deepcopy(hybrid.graph_module)})
    for part in (1, 0, 1):
        solve_parts(guide.graph_module, plain, [part], batches, ridge=1e-3)
    solved = solve_parts(guide.graph_module, hybrid, [1, 0, 1], batches, ridge=1e-3)
    assert solved == ["part_1", "part_0", "part_1"]
    wanted = plain.graph_module.state_dict()
    for name, value in hybrid.graph_module.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_data_that_is_too_much_to_hold_gives_the_same(monkeypatch):
    guide, hybrid, batches = drawn(CASES["gpt2"])
    other = Hybrid(**{**vars(hybrid), "graph_module": deepcopy(hybrid.graph_module)})
    solve_parts(guide.graph_module, hybrid, [0, 1], batches, ridge=1e-3)
    monkeypatch.setattr(walking.Walk, "_keep", lambda self, at, number, env: None)
    solve_parts(guide.graph_module, other, [0, 1], batches, ridge=1e-3)
    assert models.same_state(other.graph_module, hybrid.graph_module.state_dict())


def test_a_module_makes_its_features_once_a_batch(monkeypatch):
    guide, hybrid, batches = drawn((lambda: captured.gpt2(4), "rnn", {}))
    made: list[nn.Module] = []
    before = LinearAttention.features

    def counted(module, x, state=None):
        made.append(module)
        return before(module, x, state)

    monkeypatch.setattr(LinearAttention, "features", counted)
    solve_parts(guide.graph_module, hybrid, range(4), batches, ridge=1e-3)
    assert [made.count(hybrid.module(r)) for r in hybrid.replacements] == [len(batches)] * 4


def test_guide_and_hybrid_are_run_once_whatever_the_number_of_parts(monkeypatch):
    ran: list[str] = []
    before = walking.value_of

    def counted(graph_module, node, env, inputs):
        ran.append(node.name)
        return before(graph_module, node, env, inputs)

    monkeypatch.setattr(walking, "value_of", counted)
    for layers in (2, 4):
        guide, hybrid, batches = drawn((partial(captured.gpt2, layers), "rnn", {}))
        ran.clear()
        solve_parts(guide.graph_module, hybrid, range(layers), batches, ridge=1e-3)
        both = len(guide.graph_module.graph.nodes) + len(hybrid.graph_module.graph.nodes)
        assert len(ran) <= both * len(batches)
