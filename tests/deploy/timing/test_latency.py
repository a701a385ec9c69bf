"""Figures stand where the files run, and say how a token was made.

B batch, T time
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import pytest
import torch

import thesean
from tests import captured, exported, models
from thesean.deploy.encoder_decoder import export_network
from thesean.deploy.session import Session
from thesean.deploy.states import Arrays
from thesean.deploy.timing import latency
from thesean.deploy.timing.latency import benchmark, latency_of_models, measure
from thesean.deploy.timing.turns import doubt
from thesean.errors import ExportError


def test_calls_take_turns_and_percentiles_are_in_order():
    turns: list[str] = []
    found = measure({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=6)
    order = [turns[0], *(b for a, b in itertools.pairwise(turns) if a != b)]
    assert order == ["a", "b"] * 7  # the warm-up and six turns
    for figures in found.values():
        assert figures.repeats == 6
        assert 0 <= figures.p20_ms <= figures.median_ms <= figures.p80_ms


def test_time_that_is_over_leaves_five_repeats():
    assert measure({"a": lambda: None}, repeats=50, seconds=0)["a"].repeats == 5


@pytest.mark.parametrize(("turn_ms", "warm_up"), [(0.3, 1), (0.1, 2)])
def test_a_call_that_takes_long_has_warmed_itself_up(turn_ms, warm_up, monkeypatch):
    monkeypatch.setattr("thesean.deploy.timing.turns._LONG_MS", 0.2)
    monkeypatch.setattr("thesean.deploy.timing.turns._TURN_MS", 0.0)  # one call a turn
    now, calls = [0.0], list[None]()
    monkeypatch.setattr("thesean.deploy.timing.turns.time.perf_counter", lambda: now[0])

    def call() -> None:
        calls.append(None)
        now[0] += turn_ms / 1e3

    found = measure({"a": call}, repeats=3)["a"]
    assert len(calls) == warm_up + 3
    assert found.median_ms == pytest.approx(turn_ms)


class Clock:
    """Time passes where a call says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("thesean.deploy.timing.turns.time.perf_counter", lambda: self.now)

    def call(self, *milliseconds: float) -> Callable[[], None]:
        """One that takes these in turn."""
        each = itertools.cycle(milliseconds)

        def run() -> None:
            self.now += next(each) / 1e3

        return run


def test_a_turn_of_a_short_call_leaves_out_its_first_and_is_the_mean_of_as_many_as_take_3_ms(monkeypatch):
    """As others have filled the cache, the first takes longer."""
    clock = Clock(monkeypatch)
    warm, turn = [1.0] * 2, [7.0, 1.0, 1.0, 1.0]
    found = measure({"a": clock.call(*warm, *turn * 4)}, repeats=4)["a"]
    assert (found.median_ms, found.p20_ms, found.p80_ms) == pytest.approx((1.0, 1.0, 1.0))
    assert found.repeats == 4


def test_the_percentiles_are_those_of_the_turns_and_a_long_call_is_a_turn_by_itself(monkeypatch):
    clock = Clock(monkeypatch)
    found = measure({"a": clock.call(100.0, 100.0, 50.0, 10.0, 30.0, 20.0, 40.0)}, repeats=5)["a"]
    assert (found.p20_ms, found.median_ms, found.p80_ms) == pytest.approx((18.0, 30.0, 42.0))


@pytest.mark.parametrize(("seconds", "least", "turns"), [(10.0, 5, 8), (0.25, 2, 3), (0.25, 5, 5), (0.0, 2, 2)])
def test_there_are_as_many_turns_as_asked_for_unless_time_is_over_but_never_less_than_the_least(
    seconds, least, turns, monkeypatch
):
    clock = Clock(monkeypatch)
    assert measure({"a": clock.call(100.0)}, repeats=8, seconds=seconds, least=least)["a"].repeats == turns


@pytest.mark.thorough
def test_a_file_with_state_steps_and_one_without_recomputes_as_far_as_its_table_goes(monkeypatch: pytest.MonkeyPatch):
    files = {"guide": exported.gpt2_guide().path, "rnn": exported.gpt2_gru().path}
    lengths: dict[bool, set[int]] = {True: set(), False: set()}  # that files with and without a state were given
    run = Session.run

    def seen(session: Session, inputs: Arrays, state: Arrays | None = None) -> tuple[Arrays, Arrays]:
        lengths[session.is_stateful].add(inputs["input_ids"].shape[1])
        return run(session, inputs, state)

    monkeypatch.setattr(Session, "run", seen)
    found = latency_of_models(files, captured.gpt2().signature, contexts=(16, 128), repeats=5)
    assert lengths == {True: {16, 128, 1}, False: {16, 128}}
    assert (found["guide"].token_kind, found["rnn"].token_kind) == ("recompute", "state")
    assert found["guide"].prefill[128] is None  # its table has 64 rows
    assert found["guide"].token[128] is None
    assert found["guide"].token[16] == found["guide"].prefill[16]
    assert set(found["rnn"].medians_ms()) == {"prefill_16", "prefill_128", "token_16", "token_128"}
    rnn = found["rnn"]
    assert min(rnn.prefill[128].median_ms, rnn.token[128].median_ms) > 0
    assert rnn.token[128] != rnn.prefill[128]


def test_a_converted_network_is_timed_beside_its_guide_and_alone_after_loading(tmp_path, monkeypatch):
    turns = watched_turns(monkeypatch)
    data = [models.vectors(8, 8, seed=k) for k in range(4)]
    converted = thesean.compile(models.mlp(), "mlp", data=data, recipe="fast", progress=False)
    found = converted.benchmark(repeats=5)
    assert list(found) == ["forward"]
    assert found["forward"] > 0
    assert found.guide is not None
    for column in (found.converted, found.guide):
        figures = column["forward"]
        assert figures is not None
        assert 0 < figures["p20_ms"] <= figures["median_ms"] <= figures["p80_ms"]
        assert figures["repeats"] == 5
    assert found.environment["torch"] == torch.__version__
    assert (found.contexts, found.token_kinds, found.note) == ((), {}, "")
    assert turns == [["converted", "guide"]]
    alone = thesean.load(converted.save(tmp_path / "saved")).benchmark(repeats=5)
    assert (alone.guide, alone.note) == (
        None,
        "the guide was not timed: it is at hand only for what `compile` returned",
    )
    assert converted.benchmark(repeats=5, guide=False).note == ""
    assert turns[1:] == [["converted"], ["converted"]]


def watched_turns(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which files are timed together, call by call."""
    turns: list[list[str]] = []

    def watched(calls, *settings, **named):
        turns.append(list(calls))
        return measure(calls, *settings, **named)

    monkeypatch.setattr(latency, "measure", watched)
    return turns


def test_a_guide_that_cannot_be_exported_is_told_and_the_other_one_timed(monkeypatch):
    guide = captured.mlp()

    def refusing(graph_module, *arguments, **settings):
        if graph_module is guide.graph_module:
            raise ExportError("no such operator.")
        return export_network(graph_module, *arguments, **settings)

    monkeypatch.setattr(latency, "export_network", refusing)
    found, note = benchmark(exported.hybrid(guide, "mlp"), guide.signature, guide=guide.graph_module, repeats=5)
    assert list(found) == ["converted"]
    assert note == "the guide was not timed: no such operator."


@pytest.mark.thorough
def test_a_guides_tokens_are_timed_with_its_cache():
    converted = thesean.compile(models.gpt2(1), "mingru", data=models.token_batches(), recipe="fast", progress=False)
    found = converted.benchmark([8, 80], repeats=5)
    assert found.token_kinds == {"converted": "state", "guide": "state"}
    assert list(found) == ["prefill_8", "prefill_80", "token_8", "token_80"]
    assert found.guide is not None
    assert found.guide.keys() == found.converted.keys()
    assert (found.contexts, found.batch) == ((8, 80), 1)


@pytest.mark.thorough
def test_an_encoder_has_prefill_figures_alone():
    module = exported.hybrid(captured.encoder(), "gru")
    found, _ = benchmark(module, captured.encoder().signature, contexts=(8, 16), repeats=5)
    assert set(found["converted"].medians_ms()) == {"prefill_8", "prefill_16"}


def test_calls_are_timed_until_their_medians_are_known(monkeypatch: pytest.MonkeyPatch):
    """A steady call is known after the fewest turns, one that varies takes as many as it needs."""
    assert measure({"steady": lambda: time.sleep(0.004)}, repeats=50, seconds=60, settle=0.5)["steady"].repeats == 5
    pauses = itertools.cycle([0.002, 0.012])
    varying = measure({"varying": lambda: time.sleep(next(pauses))}, repeats=5, seconds=0.5, settle=0.01)["varying"]
    assert varying.repeats > 5


def test_the_doubt_of_a_median_shrinks_with_turns_and_is_none_without_spread():
    few, many = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0] * 40
    assert doubt([2.0] * 5) == 0
    assert doubt(few) == pytest.approx(2 / 3)  # all five of them: (5 - 1) / 2 of 3
    assert doubt(many) < doubt(few) / 2
    assert doubt([]) == math.inf
