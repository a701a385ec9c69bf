"""Structure only: what is measured where, and what is told of what can't be. Times are the machine's.

B batch, T time
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import thesean
from tests import captured, models
from tests.models import vectors
from thesean.deploy.export import export
from thesean.deploy.parity import CheckSizes
from thesean.deploy.timing import networks
from thesean.deploy.timing import parts as part_timing
from thesean.deploy.timing import plan as payoff
from thesean.deploy.timing.latency import Timing
from thesean.deploy.timing.parts import PartTiming, latency_of_parts
from thesean.deploy.timing.plan import measure_plan
from thesean.errors import ExportError, PlanError
from thesean.passes.capture.capture import capture
from thesean.passes.capture.captured import Captured
from thesean.passes.plan.hybrid import build_hybrid
from thesean.passes.plan.make_plan import bind_plan, make_plan
from thesean.passes.plan.plan import Plan


@pytest.fixture(scope="module", autouse=True)
def _few_repeats() -> Iterator[None]:
    """As few turns as a median takes: no test here looks at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payoff, "_SECONDS", 0.0)
        patch.setattr(part_timing, "_SECONDS", 0.0)
        yield


class Begun(models.Tabled):
    """Each step reads the first one too, which no state stands for."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        y = super().forward(input_ids)
        return y + y[:, :1]


@cache
def begun() -> Captured:
    return capture(models.seeded(Begun), models.tokens())


@pytest.fixture(scope="module")
def causal() -> Plan:
    """A causal guide whose table ends at 64."""
    return measure_plan(make_plan(begun(), "gru", keep=["*.mix.0*"]), (16, 100), (1, 2))


def test_a_causal_guide_is_measured_at_every_place_for_whole_inputs_and_for_one_token(causal: Plan):
    places = [(v.context, v.batch, v.kind) for v in causal.latencies]
    assert places == [(16, 1, "prefill"), (16, 1, "token"), (16, 2, "prefill"), (16, 2, "token")]
    for v in causal.latencies:
        assert min(v.guide_ms, v.plan_ms, v.ceiling_ms) > 0  # type: ignore[type-var]
        assert (v.cache_floor_ms is not None) == (v.kind == "token")


def test_a_plan_is_measured_at_the_examples_length_where_none_is_asked_for():
    guide = captured.tabled()
    plan = make_plan(guide, "gru").plan
    notes: list[str] = []
    assert payoff._sizes(plan, guide, (), (1, 2, 1), notes) == ([plan.sizes["time"]], [1, 2])
    assert payoff._sizes(plan, guide, (8, 16, 8), (1,), notes) == ([8, 16], [1])
    assert notes == []


def test_a_token_of_a_guide_without_state_costs_its_whole_context(causal: Plan):
    prefill, token = causal.latencies[:2]
    assert token.guide_ms == prefill.guide_ms
    assert token.plan_ms == prefill.plan_ms  # the first part was kept
    assert any("carries no state and reads everything again" in note for note in causal.notes)


def test_parts_have_latencies_of_their_own_and_kept_ones_no_second(causal: Plan):
    kept, replaced = causal.parts
    assert kept.latency_ms is not None
    assert kept.new_latency_ms is None
    assert replaced.latency_ms is not None
    assert replaced.new_latency_ms is not None


def test_a_context_past_the_guides_table_is_told_once_and_not_raised(causal: Plan):
    told = [n for n in causal.notes if "100 tokens" in n]
    assert told == ["the guide does not run at 100 tokens, past its table of 64 positions: nothing is measured there"]


def test_a_measured_plan_comes_back_from_yaml_and_keeps_its_figures_until_it_is_edited(causal: Plan):
    assert Plan.from_yaml(causal.to_yaml()) == causal
    assert bind_plan(begun(), causal).plan == causal
    edited = causal.edit("*.mix.1*", "mingru")
    assert edited.latencies == ()
    assert not any("latency" in note for note in edited.notes)
    by_hand = Plan.from_yaml(causal.to_yaml().replace("target: gru", "target: mingru"))
    anew = bind_plan(begun(), by_hand).plan
    assert (anew.latencies, anew.notes, anew.parts[1].new_latency_ms) == ((), (), None)


@pytest.mark.thorough
def test_a_plan_that_carries_a_state_is_said_to_and_steps_past_the_guides_table():
    plan = measure_plan(make_plan(captured.tabled(), "gru"), (64,))  # its last token is the table's
    (token,) = (v for v in plan.latencies if v.kind == "token")
    assert token.plan_ms is not None
    assert not any("no state" in note for note in plan.notes)


@pytest.mark.thorough
def test_a_guide_that_looks_ahead_has_no_tokens():
    plan = measure_plan(make_plan(captured.bert(layers=1), "gru"), (8,))
    assert [v.kind for v in plan.latencies] == ["prefill"]


def test_a_guide_without_time_has_one_figure_and_progress_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="thesean.deploy"):
        plan = thesean.plan(models.mlp(), "mlp", example_inputs=models.vectors(3, 8), context=128, batch=(2, 3))
    assert len({(p.latency_ms, p.new_latency_ms) for p in plan}) == 1  # same structure, measured once
    told = [r.getMessage() for r in caplog.records]
    assert any(line.startswith("exported the ceiling") for line in told)
    assert "measuring at batch 3" in told
    assert [(v.context, v.batch, v.kind) for v in plan.latencies] == [(None, 2, "forward"), (None, 3, "forward")]
    assert "the guide's inputs have no dynamic time dimension: contexts are ignored" in plan.notes


def test_a_guide_that_cannot_be_exported_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    def refuses(*_: object, **__: object) -> None:
        raise ExportError("torch's exporter can't write this graph")

    monkeypatch.setattr(networks, "export", refuses)
    bound_plan = make_plan(captured.mlp(), "mlp")
    plan = measure_plan(bound_plan)
    assert plan.notes == (
        *bound_plan.plan.notes,
        "latencies could not be measured: the guide can't be exported to ONNX: torch's exporter can't write this graph",
    )
    assert (plan.latencies, plan.parts) == ((), bound_plan.plan.parts)


@pytest.mark.thorough
def test_an_operator_that_onnx_lacks_is_told_and_not_raised():
    class Spectral(nn.Module):
        """x + log det(I + w w') of a linear map's output: no ONNX form."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y_BD = self.w(x)
            return x + torch.linalg.eigvalsh(y_BD.unsqueeze(2) * y_BD.unsqueeze(1))

    guide = capture(nn.Sequential(Spectral(), Spectral(), nn.Linear(4, 2)).eval(), models.vectors(3, 4))
    plan = measure_plan(make_plan(guide, "mlp"))
    assert plan.latencies == ()
    told = "latencies could not be measured: the guide can't be exported to ONNX: "
    assert any(note.startswith(told) for note in plan.notes)


def test_a_ceiling_that_cannot_be_exported_leaves_guide_and_plan(monkeypatch: pytest.MonkeyPatch):
    def refuses_the_third(module, signature, path, **settings):
        if path.stem == "2":
            raise ExportError(f"{path}: no such thing")
        return export(module, signature, path, **settings)

    monkeypatch.setattr(networks, "export", refuses_the_third)
    plan = measure_plan(make_plan(captured.mlp(), "mlp"))
    (found,) = plan.latencies
    assert found.ceiling_ms is None
    assert found.plan_ms is not None
    assert "the ceiling could not be measured: it can't be exported to ONNX: no such thing" in plan.notes


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["gru", "identity"])
def test_parts_with_masks_and_removed_parts_are_measured_by_themselves(target: str):
    bound_plan = make_plan(captured.bert(layers=1), target, granularity="sublayer")
    found, notes = latency_of_parts(bound_plan, build_hybrid(bound_plan), CheckSizes(batch=1, length=9))
    assert notes == []
    for part in bound_plan.parts:
        assert found[part.planned.path].before is not None
        assert (found[part.planned.path].after is not None) == (part.target is not None)


def test_of_several_targets_the_one_that_is_slower_than_its_parts_is_named(monkeypatch: pytest.MonkeyPatch):
    guide = captured.tabled()
    plan = make_plan(guide, "gru").plan
    first, second = (part.path for part in plan.parts)
    mixed = make_plan(guide, {first: "gru", second: "linear-attention"})
    fast, slow = (Timing(median_ms=ms, p20_ms=ms, p80_ms=ms, repeats=9) for ms in (1.0, 5.0))
    parts = {first: PartTiming(before=fast, after=slow), second: PartTiming(before=slow, after=fast)}
    monkeypatch.setattr(payoff, "latency_of_parts", lambda *_: (parts, []))
    (told,) = (note for note in measure_plan(mixed, (16,), (1,)).notes if "is slower than the parts" in note)
    assert "target 'gru' is slower than the parts it replaces" in told


class Conditioned(nn.Module):
    """x_BTD, condition_BD -> a running sum that is told the condition."""

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) + condition.unsqueeze(1)


def test_decoding_is_seen_in_the_numbers():
    assert payoff.decodes(captured.gpt2())
    assert payoff.decodes(captured.llama())
    assert payoff.decodes(captured.token_mixer())
    assert not payoff.decodes(captured.bert())
    assert not payoff.decodes(captured.encoder())  # its output has no time
    told = {"x": vectors(2, 5, 4), "condition": vectors(2, 4, seed=1)}
    assert not payoff.decodes(capture(Conditioned(), told))  # nor has one of its inputs


@pytest.mark.parametrize("wrong", [0, -1, "128", (128, 0), (), True, 1.5])
def test_wrong_sizes_are_refused_before_the_guide_is_traced(wrong: object):
    with pytest.raises(PlanError, match="context: expected whole numbers of 1 or more"):
        thesean.plan(nn.Linear(2, 2), context=wrong)  # type: ignore[call-overload]
    with pytest.raises(PlanError, match="batch: expected whole numbers of 1 or more"):
        thesean.plan(nn.Linear(2, 2), batch=wrong)  # type: ignore[call-overload]


def test_without_sizes_nothing_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(payoff, "measure_plan", lambda *_, **__: pytest.fail("measured"))
    assert thesean.plan(models.mlp(), "mlp", example_inputs=models.vectors(3, 8)).latencies == ()


def test_the_examples_length_is_what_is_no_batch():
    assert payoff._example_length(captured.gpt2()) == models.tokens().shape[1] != len(models.tokens())
    assert payoff._example_length(captured.mlp()) is None


def test_a_token_of_a_plan_that_does_not_run_is_no_step(monkeypatch):
    once = Timing(median_ms=1.0, p20_ms=1.0, p80_ms=1.0, repeats=1)
    monkeypatch.setattr(payoff, "measure", lambda calls, *_: dict.fromkeys(calls, once))
    monkeypatch.setattr(payoff, "_runs", lambda call: True)
    guide = captured.tabled()
    session: Any = SimpleNamespace(is_stateful=True)
    sizes = CheckSizes(batch=1, length=4)
    states: dict[str, Any] = {"guide": {}, "plan": {}}
    alone = payoff._token(guide, {"guide": session}, states, sizes, {"guide": once})
    assert (alone.steps, alone.plan) == (False, None)
    both = payoff._token(guide, {"guide": session, "plan": session}, states, sizes, {"guide": once, "plan": once})
    assert (both.steps, both.plan) == (True, once)
