"""Figures stand where the files run, and say how a token was made.

B batch, T time
"""

from __future__ import annotations

import itertools

import pytest

from tests import captured, exported
from thesean.deploy.latency import benchmark, latency_of_models, measure
from thesean.deploy.session import Arrays, Session


def test_calls_take_turns_and_percentiles_are_in_order():
    turns: list[str] = []
    found = measure({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, repeats=6)
    order = [turns[0], *(b for a, b in itertools.pairwise(turns) if a != b)]
    assert order == ["a", "b"] * 7  # the warm-up and six turns
    for latency in found.values():
        assert latency.repeats == 6
        assert 0 <= latency.p20_ms <= latency.median_ms <= latency.p80_ms


def test_time_that_is_over_leaves_five_repeats():
    assert measure({"a": lambda: None}, repeats=50, seconds=0)["a"].repeats == 5


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


def test_a_network_without_time_has_one_figure():
    found = benchmark(exported.hybrid(captured.mlp(), "mlp"), captured.mlp().signature, repeats=5)
    assert list(found) == ["forward"]
    assert found["forward"] > 0


@pytest.mark.thorough
def test_an_encoder_has_prefill_figures_alone():
    module = exported.hybrid(captured.encoder(), "gru")
    found = benchmark(module, captured.encoder().signature, contexts=(8, 16), repeats=5)
    assert set(found) == {"prefill_8", "prefill_16"}
